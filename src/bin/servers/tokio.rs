//! What people use: tokio, an asynchronous runtime.
//!
//! A client is a task: code that reads as if it blocked, cut by the compiler into a state machine at
//! every `.await`. The runtime runs on `-n` threads those tasks that an epoll says are ready.
//!
//! ```text
//!   task     accept.await --> spawn ------------------+
//!   task                        +--> read.await, write.await ... --> close
//!   runtime  epoll_wait --> wake the tasks that are ready --> poll each until it would wait
//! ```
//!
//! What to notice: in strace it is epoll_edge.rs with threads: EPOLLET, recv until EAGAIN, futex.
//! Break it: `--bug blocking-call` blocks in a task: `-n` silent clients stop the service.
//! Compare: epoll_edge.rs and reactors.rs, which it is made of; thread.rs, which it reads like.
//! Run: cargo run --bin tokio-server            then: cargo run --bin client -- -c 50 -t 100
//! See: epoll(7), futex(2); TLPI 63.4; docs.rs/tokio, module `runtime`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serverlab::event;
use serverlab::net::args::ServerArgs;
use serverlab::net::listen::{accept_failed, name, ran_out};
use serverlab::net::request::{BadRequest, Ended, FILLER, Requests, serve};
use serverlab::net::{self, drain};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::mpsc::{self, Sender};
use tokio::time::{sleep, timeout};

fn main() -> net::Result {
    let args = net::args::server("tokio-server", "What people use: tokio", &["blocking-call"]);
    let args: &'static ServerArgs = Box::leak(Box::new(args)); // for all tasks, to the end
    let listener = net::listen(args)?;
    listener.set_nonblocking(true)?;
    drain::on_sigterm(&listener)?;
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(args.workers.into()).enable_all().build()?;
    // Accepting is a task too: what is spawned from this thread costs a worker a wake-up each.
    runtime.block_on(runtime.spawn(accept_all(listener, args))).map_err(std::io::Error::from)?
}

async fn accept_all(listener: std::net::TcpListener, args: &'static ServerArgs) -> net::Result {
    let listener = TcpListener::from_std(listener)?;
    let (alive, mut last) = mpsc::channel::<()>(1); // closed when the last task has dropped its end
    while !drain::begun() {
        match listener.accept().await.map_err(errno) {
            Ok((connection, peer)) => {
                event!("accepted", peer = peer, fd = connection.as_raw_fd());
                tokio::spawn(serve_client(connection, peer, args, alive.clone()));
            }
            Err(_) if drain::begun() => break, // EINVAL: SIGTERM has shut the listener down
            Err(errno) if ran_out(errno) => {
                event!("accept-failed", errno = name(errno), pause_ms = 100);
                sleep(Duration::from_millis(100)).await; // this task's pause, not a thread's
            }
            Err(errno) => accept_failed(errno)?,
        }
    }
    drop(alive);
    last.recv().await;
    event!("stopped");
    Ok(())
}

async fn serve_client(mut client: TcpStream, peer: SocketAddr, args: &ServerArgs, _: Sender<()>) {
    drain::serving(&client);
    let ended = if args.bug("blocking-call") {
        let _ = fcntl(&client, FcntlArg::F_SETFL(OFlag::empty())); // no O_NONBLOCK
        serve(&client, args)
    } else {
        let Err(ended) = serve_until_error(&mut client, args).await;
        ended
    };
    drain::served(&client);
    drop(client); // close(2)
    event!("closed", peer = peer, reason = ended);
}

/// As net::request::serve, with `.await` where that blocks.
async fn serve_until_error(client: &mut TcpStream, args: &ServerArgs) -> Result<Infallible, Ended> {
    let fd = client.as_raw_fd();
    let idle = if args.idle_timeout.is_zero() { Duration::MAX } else { args.idle_timeout };
    let mut requests = Requests::new(args);
    loop {
        let next = timeout(idle, next_request(client, &mut requests)).await;
        let bytes = next.map_err(|_| Ended::TimedOut)??;
        event!("request", fd = fd, bytes = bytes);
        let mut left = bytes;
        while left > 0 {
            let chunk = FILLER.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let sent = timeout(idle, client.write(&FILLER[..chunk])).await;
            left -= sent.map_err(|_| Ended::TimedOut)?.map_err(errno)? as u64;
        }
        event!("sent", fd = fd, bytes = bytes);
    }
}

async fn next_request(client: &mut TcpStream, requests: &mut Requests) -> Result<u64, Ended> {
    loop {
        if let Some(bytes) = requests.take().map_err(Ended::BadRequest)? {
            return Ok(bytes);
        }
        match client.read(requests.space()).await.map_err(errno)? {
            0 if requests.is_partial() => return Err(Ended::BadRequest(BadRequest::CutShort)),
            0 => return Err(Ended::Eof),
            count => requests.filled(count),
        }
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
