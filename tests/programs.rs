//! Every program does what its command line says: alone, on loopback, without the laboratory.
//!
//! What they do to packets is for the other suites; here are the arguments, the answers, the
//! errors, the signals, and that a client can do nothing to a server.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use assert_cmd::assert::OutputAssertExt as _;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt::Linger,
};
use nix::unistd::Pid;
use predicates::prelude::*;
use predicates::str::contains;
use rstest::rstest;

/// No wait is longer. Everything here takes milliseconds; this is for a machine that is very busy.
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs a test for every design.
macro_rules! every_server {
    ($(#[$attribute:meta])* fn $name:ident($design:ident) $body:block) => {
        $(#[$attribute])*
        #[rstest]
        fn $name(
            #[values(
                "iterative-server",
                "fork-server",
                "thread-server",
                "prefork-accept-server",
                "prefork-select-server",
                "prefork-flock-server",
                "prefork-mutex-server",
                "prefork-epoll-server",
                "prefork-epoll-exclusive-server",
                "prefork-reuseport-server",
                "prefork-fdpass-server",
                "prethread-accept-server",
                "prethread-mutex-server",
                "prethread-queue-server",
                "select-server",
                "poll-server",
                "epoll-server",
                "epoll-edge-server",
                "epoll-oneshot-server",
                "reactors-server",
                "tokio-server",
                "io-uring-server",
                "inetd-server"
            )]
            $design: &str,
        ) $body
    };
}

// The command line.

every_server! {
    fn wrong_arguments_are_refused_with_status_2(design) {
        let refused = |arguments: &[&str]| {
            let mut server = assert_cmd::Command::from_std(program(design));
            let outcome = server.timeout(DEADLINE).args(arguments).assert();
            outcome.code(2).stderr(contains("--help"));
        };
        refused(&["--port", "65536"]);
        refused(&["--host", "nowhere"]);
        refused(&["--workers", "0"]);
        refused(&["--backlog", "-1"]);
        refused(&["--idle-timeout", "-1"]);
        refused(&["--bug", "none-of-the-bugs-it-has"]);
        if design != "inetd-server" {
            refused(&["an argument too many"]); // to inetd it is a program
        }
    }
}

every_server! {
    fn a_taken_port_is_one_line_of_error_and_status_1(design) {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        program(design)
            .args(["--host", "127.0.0.1", "--port", &port])
            .env("RUST_BACKTRACE", "1")
            .assert()
            .code(1)
            .stderr(contains("another program has the port").and(contains("\n").count(1)));
    }
}

every_server! {
    fn quiet_prints_no_line_for_a_connection(design) {
        let mut server = Server::start(design, &["-q"]);
        ask(server.address(), "10\n", 10);
        let (status, lines) = server.terminate();
        assert!(status.success());
        for line in &lines {
            // What a pool says of its workers is not about a connection.
            assert!(["listening", "started", "served", "stopped"].contains(&verb(line)), "{line}");
        }
    }
}

every_server! {
    fn it_serves_both_families_on_one_socket(design) {
        let server = Server::start(design, &["--host", "::"]);
        let port = server.address().port();
        ask((Ipv6Addr::LOCALHOST, port).into(), "10\n", 10);
        ask((Ipv4Addr::LOCALHOST, port).into(), "10\n", 10);
    }
}

// Answers.

every_server! {
    fn an_answer_has_as_many_bytes_as_asked_for(design) {
        let server = Server::start(design, &[]);
        for bytes in [0, 1, 1024, 5_000_000] {
            ask(server.address(), &format!("{bytes}\n"), bytes);
        }
    }
}

every_server! {
    fn a_connection_serves_many_requests_however_they_are_cut_or_joined(design) {
        let server = Server::start(design, &[]);
        ask(server.address(), "1\n22\r\n333\n", 1 + 22 + 333);
        let mut client = connect(server.address());
        client.set_nodelay(true).unwrap();
        for byte in "1\n22\n".as_bytes() {
            client.write_all(&[*byte]).unwrap();
        }
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut client), 23);
    }
}

every_server! {
    fn with_segment_framing_a_segment_is_a_request(design) {
        let server = Server::start(design, &["--framing", "segment"]);
        let mut client = connect(server.address());
        for bytes in [10, 2000] {
            client.write_all(bytes.to_string().as_bytes()).unwrap();
            client.read_exact(&mut vec![0; bytes]).unwrap();
        }
    }
}

// What a client can do to a server: nothing.

every_server! {
    fn a_bad_request_ends_that_connection_only(design) {
        let mut server = Server::start(design, &["--max-bytes", "5000"]);
        for (request, reason) in [
            ("ten\n", "bad-request:not-a-number"),
            ("-1\n", "bad-request:not-a-number"),
            ("\n", "bad-request:not-a-number"),
            ("GET / HTTP/1.1\r\n\r\n", "bad-request:not-a-number"),
            ("5001\n", "bad-request:over-limit"),
            ("99999999999999999999\n", "bad-request:over-limit"),
            ("000000000000000000000000", "bad-request:too-long"),
            ("10", "bad-request:cut-short"),
        ] {
            let mut client = connect(server.address());
            client.write_all(request.as_bytes()).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = client.read_to_end(&mut Vec::new()); // an end, or a reset
            server.wait_for("closed", &format!("reason={reason}"));
        }
        ask(server.address(), "5000\n", 5000);
    }
}

every_server! {
    fn a_client_that_resets_ends_its_own_connection_only(design) {
        let mut server = Server::start(design, &[]);
        // At once; with a request unanswered; in the middle of an answer too long for the buffers.
        reset(connect(server.address()));
        let mut client = connect(server.address());
        client.write_all(b"10").unwrap();
        reset(client);
        let mut client = connect(server.address());
        client.write_all(b"60000000\n").unwrap();
        client.read_exact(&mut [0; 1000]).unwrap();
        reset(client);
        for _ in 0..3 {
            server.wait_for("closed", "reason=E");
        }
        ask(server.address(), "10\n", 10);
    }
}

every_server! {
    fn a_client_that_closes_without_a_word_is_an_ordinary_end(design) {
        let mut server = Server::start(design, &[]);
        drop(connect(server.address()));
        server.wait_for("closed", "reason=eof");
        ask(server.address(), "10\n", 10);
    }
}

every_server! {
    fn idle_clients_are_closed_after_the_idle_timeout(design) {
        let mut server = Server::start(design, &["--idle-timeout", "0.2"]);
        // One that says nothing.
        let mut silent = connect(server.address());
        assert_eq!(read_to_end(&mut silent), 0);
        server.wait_for("closed", "reason=idle-timeout");
        // One that sends a digit now and then, for longer than the time it has (slowloris).
        let mut slow = connect(server.address());
        slow.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let started = Instant::now();
        while slow.write_all(b"1").is_ok() && slow.read(&mut [0]).is_err_and(would_block) {
            assert!(started.elapsed() < DEADLINE, "{design} is kept busy by a digit now and then");
        }
        server.wait_for("closed", "reason=idle-timeout");
        // One that asks and does not read.
        let mut deaf = connect(server.address());
        deaf.write_all(b"60000000\n").unwrap();
        server.wait_for("closed", "reason=idle-timeout");
        ask(server.address(), "10\n", 10);
    }
}

every_server! {
    fn a_reader_of_its_events_that_is_gone_does_not_end_it(design) {
        let mut server = Server::start(design, &[]);
        server.hang_up();
        ask(server.address(), "10\n", 10);
        ask(server.address(), "10\n", 10);
    }
}

// Signals.

every_server! {
    fn sigterm_finishes_the_answer_that_is_being_sent(design) {
        let mut server = Server::start(design, &[]);
        let mut client = connect(server.address());
        let bytes = 60_000_000; // more than the sockets of both sides can hold
        client.write_all(format!("{bytes}\n").as_bytes()).unwrap();
        client.read_exact(&mut [0; 1000]).unwrap();
        server.signal(Signal::SIGTERM);
        assert_eq!(1000 + read_to_end(&mut client), bytes);
        let (status, lines) = server.wait();
        assert!(status.success(), "{status} {lines:#?}");
        assert!(lines.iter().any(|line| verb(line) == "sent"), "{lines:#?}");
        assert_eq!(verb(lines.back().unwrap()), "stopped");
    }
}

every_server! {
    fn sigterm_and_sigint_end_it_even_if_a_client_is_silent(design) {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let mut server = Server::start(design, &[]);
            let mut silent = connect(server.address());
            server.wait_for("accepted", "");
            server.signal(signal);
            assert_eq!(read_to_end(&mut silent), 0);
            let (status, lines) = server.wait();
            assert!(status.success(), "{status} {lines:#?}");
        }
    }
}

every_server! {
    fn nothing_is_left_of_a_burst(design) {
        let mut server = Server::start(design, &[]);
        // A client for each of ten workers: what a reactor makes when it begins has been made.
        for _ in 0..10 {
            ask(server.address(), "1\n", 1);
            server.wait_for("closed", ""); // its descriptor is not among those counted below
        }
        let children = if design.starts_with("prefork") { 10 } else { 0 };
        server.until("its workers are there", |server| server.children().len() == children);
        let descriptors = server.descriptors();
        let port = server.address().port().to_string();
        program("client").args(["-p", &port, "-c", "20", "-t", "10", "-b", "2000"]).assert().success();
        for _ in 0..200 {
            server.wait_for("closed", "");
        }
        server.until("its descriptors and children are as before the burst", |server| {
            (server.descriptors(), server.children().len()) == (descriptors, children)
        });
        assert!(server.children().into_iter().all(|child| state(child) != Some('Z')));
    }
}

// Pools of processes.

/// Runs a test for every design with a pool of processes.
macro_rules! every_pool {
    ($(#[$attribute:meta])* fn $name:ident($design:ident) $body:block) => {
        $(#[$attribute])*
        #[rstest]
        fn $name(
            #[values(
                "prefork-accept-server",
                "prefork-select-server",
                "prefork-flock-server",
                "prefork-mutex-server",
                "prefork-epoll-server",
                "prefork-epoll-exclusive-server",
                "prefork-reuseport-server",
                "prefork-fdpass-server"
            )]
            $design: &str,
        ) $body
    };
}

every_pool! {
    fn a_pool_counts_every_connection(design) {
        let mut server = Server::start(design, &["-n", "4", "-q"]);
        let port = server.address().port().to_string();
        program("client").args(["-p", &port, "-c", "8", "-t", "50"]).assert().success();
        let (_, lines) = server.terminate();
        let counts = lines.iter().filter(|line| line.contains(" served worker="));
        let counts = counts.map(|line| line.split("connections=").nth(1).unwrap());
        let counts: Vec<u32> = counts.map(|count| count.parse().unwrap()).collect();
        assert_eq!((counts.len(), counts.iter().sum()), (4, 400), "{lines:#?}");
        assert!(lines.iter().any(|line| line.ends_with(" served sum=400")), "{lines:#?}");
    }
}

every_pool! {
    fn a_worker_that_is_killed_is_replaced(design) {
        let mut server = Server::start(design, &["-n", "3"]);
        server.until("its workers are there", |server| server.children().len() == 3);
        let victims = server.children();
        for victim in &victims {
            kill(*victim, Signal::SIGKILL).unwrap(); // among them whoever holds the lock
        }
        server.until("three others are in their place", |server| {
            let children = server.children();
            children.len() == 3 && !children.iter().any(|child| victims.contains(child))
        });
        if design == "prefork-reuseport-server" {
            server.until("three listen", |server| server.listeners() == 3);
        }
        ask(server.address(), "10\n", 10);
        let (status, lines) = server.terminate();
        assert!(status.success(), "{lines:#?}");
    }
}

every_pool! {
    fn a_worker_that_is_told_to_stop_finishes_its_client_and_is_replaced(design) {
        let mut server = Server::start(design, &["-n", "1"]);
        let mut client = connect(server.address());
        client.write_all(b"60000000\n").unwrap();
        client.read_exact(&mut [0; 1000]).unwrap();
        kill(server.children()[0], Signal::SIGTERM).unwrap();
        assert_eq!(1000 + read_to_end(&mut client), 60_000_000);
        server.wait_for("reaped", "status=0");
        server.wait_for("started", "worker=0");
        if design == "prefork-reuseport-server" {
            // A listener of its own; it may say so before its parent says that it has started.
            server.until("it listens", |server| server.listeners() == 1);
        }
        ask(server.address(), "10\n", 10);
    }
}

every_pool! {
    fn no_worker_outlives_a_parent_that_is_killed(design) {
        let mut server = Server::start(design, &["-n", "3"]);
        ask(server.address(), "10\n", 10);
        server.signal(Signal::SIGKILL);
        server.wait(); // until the last of those who could print has ended
    }
}

// One design.

#[rstest]
#[case::robust(&[], true)]
#[case::plain(&["--bug", "plain-mutex"], false)]
fn the_mutex_of_a_killed_worker(#[case] bug: &[&str], #[case] survives: bool) {
    let mut server = Server::start("prefork-mutex-server", &[&["-n", "2"], bug].concat());
    // One waits in accept with the mutex, the other for the mutex.
    let (mut holder, mut waiter) = (None, None);
    server.until("one waits in accept and one for the mutex", |server| {
        let waits = |call: &str| server.children().into_iter().find(|pid| in_call(*pid, call));
        (holder, waiter) = (waits("accept4"), waits("futex"));
        holder.is_some() && waiter.is_some()
    });
    kill(holder.unwrap(), Signal::SIGKILL).unwrap();
    if survives {
        server.wait_for("recovered", "worker=");
        ask(server.address(), "10\n", 10);
    } else {
        server.wait_for("started", "worker="); // the first three are of the start
        server.until("all wait for the mutex", |server| {
            let children = server.children();
            children.len() == 2 && children.iter().all(|pid| in_call(*pid, "futex"))
        });
        kill(waiter.unwrap(), Signal::SIGKILL).unwrap();
    }
}

#[test]
fn fork_reaps_every_child_and_says_how_it_ended() {
    let mut server = Server::start("fork-server", &[]);
    let clients: Vec<_> = (0..50).map(|_| connect(server.address())).collect();
    for _ in &clients {
        server.wait_for("forked", "child=");
    }
    drop(clients); // so that many end at once, and SIGCHLD coalesces
    for _ in 0..50 {
        server.wait_for("reaped", "status=0");
    }
    assert_eq!(server.children(), []);
}

#[test]
fn fork_without_reaping_leaves_a_zombie_a_client() {
    let mut server = Server::start("fork-server", &["--bug", "no-reap"]);
    for _ in 0..3 {
        ask(server.address(), "1\n", 1);
        server.wait_for("closed", "");
    }
    server.until("three children are zombies", |server| {
        server.children().iter().filter(|child| state(**child) == Some('Z')).count() == 3
    });
    let (status, lines) = server.terminate();
    assert!(status.success(), "{lines:#?}");
}

#[rstest]
fn a_leaked_connection_is_never_closed(#[values("iterative-server", "fork-server")] design: &str) {
    let mut server = Server::start(design, &["--bug", "leak-connection"]);
    let mut client = connect(server.address());
    client.shutdown(std::net::Shutdown::Write).unwrap();
    server.wait_for("closed", "reason=eof");
    if design == "fork-server" {
        server.wait_for("reaped", ""); // its child closes by _exit(2)
    }
    client.set_nonblocking(true).unwrap();
    let read = client.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(read, Err(std::io::ErrorKind::WouldBlock), "a FIN came all the same");
}

#[rstest]
// The bug of keeping the parent's copies lets the descriptors of fork-server run out as well.
#[case::fork("fork-server", &["--bug", "leak-connection"], false)]
#[case::thread("thread-server", &[], true)]
#[case::select("select-server", &[], true)]
#[case::poll("poll-server", &[], true)]
#[case::epoll("epoll-server", &[], true)]
#[case::epoll_edge("epoll-edge-server", &[], true)]
#[case::tokio("tokio-server", &["-n", "2"], true)]
#[case::io_uring("io-uring-server", &[], true)]
#[case::epoll_oneshot("epoll-oneshot-server", &["-n", "2"], true)]
fn more_connections_than_descriptors_cost_time_but_not_the_server(
    #[case] design: &str,
    #[case] bug: &[&str],
    #[case] recovers: bool,
) {
    // Some are taken: by what the test harness leaves open, and by a runtime such as tokio.
    let mut server = Server::limited(design, bug, "ulimit -n 24");
    let mut clients: Vec<_> = (0..24).map(|_| connect(server.address())).collect();
    let failures: Vec<f64> = (0..4)
        .map(|_| stamp(&server.wait_for("accept-failed", "errno=EMFILE pause_ms=100")))
        .collect();
    let pauses = failures.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(pauses.clone().all(|pause| pause > 0.09), "it spins: {failures:?}");
    if recovers {
        clients[0].write_all(b"5\n").unwrap(); // whoever is in is served meanwhile
        clients[0].read_exact(&mut [0; 5]).unwrap();
        drop(clients);
        ask(server.address(), "10\n", 10);
    }
    let (status, lines) = server.terminate();
    assert!(status.success(), "{lines:#?}");
}

#[test]
fn inetd_makes_any_filter_a_server() {
    let mut server = Server::start("inetd-server", &["tr", "a-z", "A-Z"]);
    let mut client = connect(server.address());
    client.write_all(b"shout").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "SHOUT");
    server.wait_for("reaped", "status=0");
    let mut server = Server::start("inetd-server", &["/no/such/program"]);
    assert_eq!(read_to_end(&mut connect(server.address())), 0);
    server.wait_for("exec-failed", "No such file");
    server.wait_for("reaped", "status=127");
}

#[test]
fn a_listener_that_was_passed_outlives_its_server() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    for _ in 0..2 {
        let waiting = connect(address); // before the server runs
        let mut server = Server::spawn(activated(&listener, "LISTEN_PID=$$ LISTEN_FDS=1"), &[]);
        server.wait_for("accepted", "");
        drop(waiting);
        ask(address, "10\n", 10);
        let (status, lines) = server.terminate();
        assert!(status.success(), "{lines:#?}");
    }
    connect(address); // nobody serves, and nobody is refused
}

#[rstest]
#[case::nothing_passed("true", "no listener was passed: LISTEN_PID")]
#[case::for_somebody_else("LISTEN_PID=1 LISTEN_FDS=1", "for another process: LISTEN_PID=1")]
#[case::not_a_number("LISTEN_PID=$$ LISTEN_FDS=x", "LISTEN_FDS=x")]
#[case::too_many("LISTEN_PID=$$ LISTEN_FDS=2", "one listener is needed, and LISTEN_FDS=2")]
fn a_listener_that_was_not_passed_is_one_line_of_error(#[case] set: &str, #[case] error: &str) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    activated(&listener, set).assert().code(1).stderr(contains(error).and(contains("\n").count(1)));
}

/// activated-server, with a listener as its descriptor 3 and these variables. The shell is handed
/// the listener as its standard input: whatever other tests start beside it inherits nothing.
fn activated(listener: &TcpListener, set: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("export {set}; exec \"$0\" \"$@\" 3<&0 0</dev/null")]);
    shell.arg(program("activated-server").get_program());
    shell.stdin(OwnedFd::from(listener.try_clone().unwrap()));
    shell
}

// The client.

#[test]
fn the_client_counts_what_it_asked_for() {
    let server = Server::start("fork-server", &["-q"]);
    let port = server.address().port().to_string();
    let arguments = ["-p", &port, "-c", "4", "-t", "5", "-b", "3000", "-k", "3"];
    program("client")
        .args(arguments)
        .assert()
        .success()
        .stdout(contains("60 of 60 answers of 3000 bytes").and(contains("p99")))
        .stderr("");
    let output = program("client").args(arguments).arg("--json").assert().success();
    let summary: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(summary["answered"], 60);
    assert_eq!(summary["failed"], 0);
    assert!(summary["p50_us"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_client_says_what_went_wrong() {
    // Nobody listens at a port that is ours, so that no other test listens there either.
    let flags = SockFlag::SOCK_CLOEXEC;
    let taken = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    bind(taken.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let taken = TcpStream::from(taken);
    let port = taken.local_addr().unwrap().port().to_string();
    program("client")
        .args(["-p", &port, "-c", "2", "-t", "2"])
        .assert()
        .code(1)
        .stdout(contains("4 failed: 4 ECONNREFUSED (nobody listens there)"));
    // The server closes without an answer.
    let server = Server::start("fork-server", &["-q", "--max-bytes", "10"]);
    let port = server.address().port().to_string();
    program("client")
        .args(["-p", &port, "-b", "11"])
        .assert()
        .code(1)
        .stdout(contains("1 failed: 1 short-answer"));
    // The server resets.
    let server = Server::start("rst-server", &["-q"]);
    let port = server.address().port().to_string();
    program("client")
        .args(["-p", &port])
        .assert()
        .code(1)
        .stdout(contains("1 ECONNRESET").or(contains("1 EPIPE")));
    // Nobody accepts.
    let deaf = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = deaf.local_addr().unwrap().port().to_string();
    program("client")
        .args(["-p", &port, "--timeout", "0.1"])
        .assert()
        .code(1)
        .stdout(contains("1 timed-out"));
    // More comes than was asked for.
    let answers_too_much = std::thread::spawn(move || {
        let (mut connection, _) = deaf.accept().unwrap(); // the one that timed out
        let _ = connection.write_all(b"x");
        let (mut connection, _) = deaf.accept().unwrap();
        let _ = connection.write_all(b"xxx");
    });
    program("client")
        .args(["-p", &port, "-b", "2"])
        .assert()
        .code(1)
        .stdout(contains("1 long-answer"));
    answers_too_much.join().unwrap();
    // No such host, no such number.
    program("client")
        .args(["-i", "no-such-host.invalid"])
        .assert()
        .code(1)
        .stderr(contains("no address is known for `no-such-host.invalid`"));
    program("client").args(["-c", "0"]).assert().code(2);
}

#[test]
fn sigint_ends_the_clients_children_and_prints_what_was_done() {
    let deaf = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = deaf.local_addr().unwrap().port().to_string();
    let client =
        program("client").args(["-p", &port, "-c", "3"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut connected: Vec<_> = (0..3).map(|_| deaf.accept().unwrap()).collect();
    for (connection, _) in &mut connected {
        connection.set_read_timeout(Some(DEADLINE)).unwrap();
        connection.read_exact(&mut [0; 5]).unwrap();
    }
    kill(Pid::from_raw(client.id() as i32), Signal::SIGINT).unwrap();
    let output = client.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(contains("3 failed: 3 not-made").eval(&String::from_utf8_lossy(&output.stdout)));
    for (mut connection, _) in connected {
        assert_eq!(read_to_end(&mut connection), 0, "the child is gone");
    }
}

// Demos.

#[rstest]
#[case::the_reader_dies_at_its_first_send(&[], &["recv ECONNRESET", "recv 0"], None)]
#[case::the_writer_dies_at_its_second_send(
    &["--first", "write"], &["send ECONNRESET"], None)]
#[case::ignored_it_is_epipe(
    &["--sigpipe", "ignore"],
    &["recv ECONNRESET", "recv 0", "send EPIPE", "send EPIPE"], Some(0))]
#[case::ignored_and_written_first(
    &["--sigpipe", "ignore", "--first", "write"], &["send ECONNRESET", "send EPIPE"], Some(0))]
#[case::no_signal_for_this_send(
    &["--no-signal"], &["recv ECONNRESET", "recv 0", "send EPIPE", "send EPIPE"], Some(0))]
fn sigpipe_demo(#[case] flags: &[&str], #[case] expected: &[&str], #[case] status: Option<i32>) {
    let server = Server::start("rst-server", &["-q"]);
    let port = server.address().port().to_string();
    let output = program("sigpipe-demo").args(["-p", &port]).args(flags).output().unwrap();
    assert_eq!(calls(&output.stdout), expected);
    assert_eq!(output.status.code(), status); // None: ended by a signal
    if status.is_none() {
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(output.status.signal(), Some(Signal::SIGPIPE as i32));
    }
}

#[test]
fn two_peers_play_an_exchange_step_by_step() {
    let mut server = Server::start("peer", &["listen", "accept", "recv", "linger:0", "close"]);
    let port = server.address().port().to_string();
    let steps =
        ["connect", "send:5", "recv", "recv", "send:hello", "getpeername", "close", "close"];
    let output = program("peer").args(["-p", &port]).args(steps).output().unwrap();
    assert_eq!(
        calls(&output.stdout),
        [
            "send 5",
            "recv ECONNRESET",
            "recv 0",
            "send EPIPE",
            "getpeername ENOTCONN",
            "close EBADF"
        ]
    );
    server.wait_for("received", "bytes=5");
    server.wait_for("set", "option=SO_LINGER on=1 seconds=0");
    assert!(server.wait().0.success());
}

#[test]
fn a_peer_pauses_until_it_is_told_to_go_on() {
    let mut server = Server::start("peer", &["listen", "pause", "accept", "recv", "poll:rdhup"]);
    server.wait_for("paused", "");
    let mut client = connect(server.address());
    client.write_all(b"before accept").unwrap();
    server.input().write_all(b"\n").unwrap();
    server.wait_for("resumed", "");
    server.wait_for("received", "bytes=13");
    drop(client);
    server.wait_for("polled", "revents=rdhup");
}

#[test]
fn a_peer_refuses_what_is_no_step() {
    program("peer").arg("sned:1").assert().code(2).stderr(contains("no such step"));
    program("peer").assert().code(2);
}

// The harness.

/// A program of this package, as Cargo built it for this test.
fn program(name: &str) -> Command {
    let tests = std::env::current_exe().unwrap();
    let path: PathBuf = tests.ancestors().nth(2).unwrap().join(name);
    assert!(path.exists(), "{} is no [[bin]] of Cargo.toml", path.display());
    Command::new(path)
}

/// A program that listens, its event lines, and its end: killed when the test is over.
struct Server {
    child: Child,
    lines: Receiver<String>,
    seen: VecDeque<String>,
    address: SocketAddr,
}

impl Server {
    /// Starts a server on a free port of loopback and waits until it listens.
    #[track_caller]
    fn start(name: &str, arguments: &[&str]) -> Server {
        let mut command = program(name);
        command.stdin(Stdio::piped());
        Server::spawn(command, arguments)
    }

    /// The same under a limit that a shell sets first.
    #[track_caller]
    fn limited(name: &str, arguments: &[&str], limit: &str) -> Server {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("{limit}; exec \"$0\" \"$@\"")])
            .arg(program(name).get_program());
        Server::spawn(shell, arguments)
    }

    #[track_caller]
    fn spawn(mut command: Command, arguments: &[&str]) -> Server {
        command.args(["--port", "0"]).args(arguments);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return; // drops the pipe's end: nobody listens any more
                }
            }
        });
        let address = (Ipv4Addr::UNSPECIFIED, 0).into();
        let mut server = Server { child, lines, seen: VecDeque::new(), address };
        let listening = server.wait_for("listening", "");
        let address = listening.split("address=").nth(1).unwrap().split(' ').next().unwrap();
        server.address = address.parse().unwrap();
        server
    }

    /// Where to reach it from here.
    fn address(&self) -> SocketAddr {
        let mut address = self.address;
        if address.ip() == Ipv4Addr::UNSPECIFIED {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        address
    }

    /// The next event line with this verb and this text in it; what comes before it is passed over.
    #[track_caller]
    fn wait_for(&mut self, wanted: &str, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let found = verb(&line) == wanted && line.contains(text);
                    self.seen.push_back(line.clone());
                    if found {
                        return line;
                    }
                }
                Err(why) => panic!("no `{wanted} {text}`: {why}; so far: {:#?}", self.seen),
            }
        }
    }

    /// Looks again and again until something is so, with a pause that the event lines end.
    #[track_caller]
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&Server) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "waited for: {what}; so far: {:#?}", self.seen);
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(5)) {
                self.seen.push_back(line);
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn input(&mut self) -> &mut std::process::ChildStdin {
        self.child.stdin.as_mut().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Lets go of the pipe that its event lines go to.
    fn hang_up(&mut self) {
        self.lines = channel().1;
        // The thread that reads the pipe notices at the next line.
    }

    #[track_caller]
    fn terminate(&mut self) -> (ExitStatus, VecDeque<String>) {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end: its status, and the event lines that nobody has waited for.
    #[track_caller]
    fn wait(&mut self) -> (ExitStatus, VecDeque<String>) {
        let deadline = Instant::now() + DEADLINE;
        let mut lines = VecDeque::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => lines.push_back(line),
                // Everybody who could print has ended.
                Err(RecvTimeoutError::Disconnected) => return (self.child.wait().unwrap(), lines),
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; so far: {lines:#?}"),
            }
        }
    }

    /// How many descriptors it has open.
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Its children, zombies included.
    fn children(&self) -> Vec<Pid> {
        let list = format!("/proc/{0}/task/{0}/children", self.pid());
        let pids = std::fs::read_to_string(list).unwrap_or_default();
        pids.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
    }

    /// How many sockets listen at its port: state 0A in proc_net_tcp(5).
    fn listeners(&self) -> usize {
        let row = format!(":{:04X} 00000000:0000 0A ", self.address().port());
        std::fs::read_to_string("/proc/net/tcp").unwrap().matches(&row).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let children = self.children();
        let _ = self.child.kill(); // first, lest it replace them
        for child in children {
            let _ = kill(child, Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// A process's state letter, as in /proc/PID/stat: `Z` is a zombie.
fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Whether a process is blocked in a system call, by its number in /proc/PID/syscall.
fn in_call(pid: Pid, call: &str) -> bool {
    let number = match call {
        "accept4" => libc::SYS_accept4,
        "futex" => libc::SYS_futex,
        _ => panic!("{call} has no number here"),
    };
    let now = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    now.starts_with(&format!("{number} "))
}

/// The verb of an event line: `stamp program[pid] verb key=value ...`.
fn verb(line: &str) -> &str {
    line.split(' ').nth(2).unwrap_or("")
}

fn stamp(line: &str) -> f64 {
    line.split(' ').next().unwrap().parse().unwrap()
}

/// What the calls of a demo came to, from its events: `recv 5`, `send EPIPE`.
fn calls(stdout: &[u8]) -> Vec<String> {
    let value = |line: &str, key: &str| {
        let value = line.split(&format!(" {key}=")).nth(1)?.split(' ').next()?;
        Some(value.to_owned())
    };
    let call = |line: &str| match verb(line) {
        "received" => Some(format!("recv {}", value(line, "bytes")?)),
        "sent" => Some(format!("send {}", value(line, "bytes")?)),
        "failed" => Some(format!("{} {}", value(line, "call")?, value(line, "errno")?)),
        _ => None,
    };
    String::from_utf8_lossy(stdout).lines().filter_map(call).collect()
}

#[track_caller]
fn connect(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
}

/// Sends a request on a connection of its own, closes that half and checks the answer's length.
#[track_caller]
fn ask(address: SocketAddr, request: &str, bytes: usize) {
    let mut client = connect(address);
    client.write_all(request.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut client), bytes, "the answer to {request:?}");
}

#[track_caller]
fn read_to_end(client: &mut TcpStream) -> usize {
    std::io::copy(client, &mut std::io::sink()).unwrap() as usize
}

/// Closes with SO_LINGER{1,0}: a RST.
fn reset(client: TcpStream) {
    setsockopt(&client, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

fn would_block(error: std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock
}
