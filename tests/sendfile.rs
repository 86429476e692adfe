//! A file sent five ways: the same bytes, other system calls; a head in its first segment; a file
//! cut while it is sent.

mod common;

use common::play::connecting;
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::Side;
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::net::sample;
use serverlab::{args, experiment, program};

const BYTES: usize = 256 * 1024;

fn demo(lab: &Lab, family: Family, port: u16, flags: &[&str]) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let demo = lab.server().command(&program!("sendfile-demo")).args(args!["-i", host, "-p", port]);
    let demo = demo.args(flags).spawn()?;
    demo.event("listening")?;
    Ok(demo)
}

/// The field of the event that tells what was sent of the file.
fn sent(demo: &Process, key: &str) -> Option<usize> {
    let events = demo.events();
    let last = events.iter().rfind(|event| event.verb == "sent" && event.get("calls").is_some())?;
    last.get(key)?.parse().ok()
}

#[rstest]
#[case::read_write("read-write", 8, "a read and a send for each 64 KiB")]
#[case::sendfile("sendfile", 1, "one sendfile")]
#[case::splice("splice", 8, "two splices for each 64 KiB, what a pipe holds")]
#[case::mmap("mmap", 1, "one send")]
#[case::zerocopy("zerocopy", 1, "one send")]
fn the_same_bytes(
    #[case] how: &str,
    #[case] calls: usize,
    #[case] which: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{how}-{family}"), "What does it take to send a file?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, &["--how", how])?;
        let capture = lab.capture()?;
        let client = connecting(lab, family, port, &["recv-all", "close"])?;
        lab.claim_eq("the server ends well", demo.ending()?, Ending::Exit(0));
        let wire = capture.finish()?;
        lab.claim_eq(
            "the client receives as much, and then the end",
            common::answers(&client),
            [format!("recv {BYTES}"), "recv 0".to_owned()],
        );
        let flow = wire.at("client").flow(port)?;
        let told = demo.event("opened")?.get("checksum").map(str::to_owned);
        let seen = format!("{:016x}", sample::checksum(flow.payload(Side::Server)));
        lab.claim_eq("the bytes on the wire are the file's, by their checksum", Some(seen), told);
        lab.claim_eq("nothing is missing", sent(&demo, "missing"), Some(0));
        let sentence = format!("it takes {calls} calls: {which}");
        lab.claim_eq(sentence, sent(&demo, "calls"), Some(calls));
        if how == "zerocopy" {
            let completed = demo.event("completed")?;
            lab.claim_eq("a completion tells of the send", completed.get("sends"), Some("1"));
            lab.claim_eq(
                "and that the kernel copied after all, as it does on veth (Linux 6.18)",
                completed.get("copied"),
                Some("true"),
            );
        }
        Ok(())
    });
}

#[rstest]
#[case::more(true)]
#[case::no_more(false)]
fn a_head_and_a_file(
    #[case] more: bool,
    #[values("sendfile", "splice", "read-write")] how: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    let case = format!("{}-{how}-{family}", if more { "more" } else { "no-more" });
    experiment!(case, "Do a head and a short file share a segment?", |lab| {
        let port = lab.port()?;
        let mut flags = vec!["--how", how, "--head", "100", "--bytes", "300"];
        flags.extend(more.then_some("--more"));
        let demo = demo(lab, family, port, &flags)?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["recv-all", "close"])?;
        demo.ending()?;
        let wire = capture.finish()?;
        let segments = if more {
            "server > client  P.  1:401"
        } else {
            "server > client  P.  1:101
             server > client  P.  101:401"
        };
        let ladder = format!(
            "client > server  S
             server > client  S.
             client > server  .
             {segments}
             server > client  F.  seq 401
             client > server  F.  seq 1"
        );
        let sentence = match more {
            true => "after MSG_MORE they do",
            false => "without MSG_MORE they do not (TCP_NODELAY is set)",
        };
        lab.claim(sentence, wire.ladder(port, &ladder));
        Ok(())
    });
}

/// A file of 64 KiB, cut to 10000 bytes after its length is known and before it is sent.
#[rstest]
#[case::read_write("read-write", 10_000, None)]
#[case::sendfile("sendfile", 10_000, None)]
#[case::splice("splice", 10_000, None)]
#[case::mmap("mmap", 0, Some("EFAULT"))] // Linux 6.18: nothing of a chunk that it cannot read
fn a_file_cut_while_it_is_sent(
    #[case] how: &str,
    #[case] bytes: usize,
    #[case] errno: Option<&str>,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(format!("{how}-{family}"), "What is sent of a file that was cut?", |lab| {
        let port = lab.port()?;
        let flags = ["--how", how, "--bytes", "65536", "--truncate", "10000"];
        let demo = demo(lab, family, port, &flags)?;
        let capture = lab.capture()?;
        let client = connecting(lab, family, port, &["recv-all", "close"])?;
        lab.claim_eq("it does not die of it", demo.ending()?, Ending::Exit(0));
        let wire = capture.finish()?;
        let total: usize = common::answers(&client)
            .iter()
            .filter_map(|answer| answer.strip_prefix("recv ")?.parse::<usize>().ok())
            .sum();
        lab.claim_eq("what the client receives", total, bytes);
        lab.claim_eq("what the sender counts", sent(&demo, "bytes"), Some(bytes));
        let failed = demo.events().into_iter().find(|event| event.verb == "failed");
        let failed = failed.and_then(|event| event.get("errno").map(str::to_owned));
        lab.claim_eq("how its last call fails", failed.as_deref(), errno);
        let payload = wire.at("client").flow(port)?.payload(Side::Server);
        let whole = sample::bytes(65536);
        lab.claim("what arrives is the file's beginning", *payload == whole[..bytes]);
        Ok(())
    });
}

#[rstest]
fn a_mapping_of_a_cut_file_sends_zeros(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What is sent from a mapped page that the file ends in?", |lab| {
        let port = lab.port()?;
        let flags = ["--how", "mmap", "--bytes", "4096", "--truncate", "1000"];
        let demo = demo(lab, family, port, &flags)?;
        let capture = lab.capture()?;
        let client = connecting(lab, family, port, &["recv-all", "close"])?;
        demo.ending()?;
        let wire = capture.finish()?;
        lab.claim_eq("the whole page is sent", common::answers(&client)[0].as_str(), "recv 4096");
        lab.claim_eq(
            "and no error tells that the file is shorter",
            sent(&demo, "missing"),
            Some(0),
        );
        let payload = wire.at("client").flow(port)?.payload(Side::Server);
        lab.claim("first the file's 1000 bytes", payload[..1000] == sample::bytes(4096)[..1000]);
        lab.claim("then zeros", payload[1000..].iter().all(|byte| *byte == 0));
        Ok(())
    });
}
