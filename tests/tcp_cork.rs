//! Three small writes as three segments or as one: TCP_CORK, MSG_MORE, writev, TCP_NODELAY.

mod common;

use common::play::{connecting, ms};
use rstest::rstest;
use serverlab::lab::experiment::Lab;
use serverlab::lab::flow::{Flow, Side};
use serverlab::lab::host::Family;
use serverlab::lab::process::{Ending, Process};
use serverlab::{args, experiment, program};

fn demo(lab: &Lab, family: Family, port: u16, flags: &[&str]) -> anyhow::Result<Process> {
    let host = lab.server().address(family);
    let demo = lab.server().command(&program!("cork-demo")).args(args!["-i", host, "-p", port]);
    let demo = demo.args(flags).spawn()?;
    demo.event("listening")?;
    Ok(demo)
}

/// Milliseconds from the server's end of the handshake to its first segment with data.
fn held_back(flow: &Flow) -> Option<u64> {
    let opened = flow.steps.iter().find(|step| step.completes_handshake)?;
    let first = flow.steps.iter().find(|step| step.from == Side::Server && step.len > 0)?;
    Some(ms(first.at - opened.at))
}

const ONE: &str = "client > server  S
                   server > client  S.
                   client > server  .
                   server > client  P.  1:601
                   client > server  F.  seq 1 ack 601
                   server > client  F.  seq 601";

const THREE: &str = "client > server  S
                     server > client  S.
                     client > server  .
                     server > client  P.  1:101
                     server > client  P.  101:301
                     server > client  P.  301:601
                     client > server  F.  seq 1 ack 601
                     server > client  F.  seq 601";

#[rstest]
#[case::nodelay("nodelay", THREE, "three", "3")]
#[case::cork("cork", ONE, "one", "1")]
#[case::more("more", ONE, "one", "1")]
#[case::writev("writev", ONE, "one", "1")]
fn three_pieces(
    #[case] how: &str,
    #[case] ladder: &str,
    #[case] segments: &str,
    #[case] count: &str,
    #[values(Family::V4, Family::V6)] family: Family,
) {
    experiment!(
        format!("{how}-{family}"),
        "How many segments do three small pieces make?",
        |lab| {
            let port = lab.port()?;
            let demo = demo(lab, family, port, &["--how", how])?;
            let capture = lab.capture()?;
            connecting(lab, family, port, &["flags:waitall", "recv:600", "close"])?;
            lab.claim_eq("the server ends well", demo.ending()?, Ending::Exit(0));
            let wire = capture.finish()?;
            lab.claim(format!("with {how}, {segments} on the wire"), wire.ladder(port, ladder));
            lab.claim_eq(
                "the server's kernel counts as many (TCP_INFO, tcpi_data_segs_out)",
                demo.event("got")?.get("data_segs_out"),
                Some(count),
            );
            Ok(())
        }
    );
}

#[rstest]
fn plain_writes_make_one_to_three(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "How many segments do three plain writes make?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, &["--how", "plain"])?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["flags:waitall", "recv:600", "close"])?;
        demo.ending()?;
        let wire = capture.finish()?;
        lab.claim(
            "the first write leaves alone: nothing is unacknowledged yet",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  P.  1:101
                 server > client  P.  101:601 split
                 client > server  F.  seq 1 ack 601
                 server > client  F.  seq 601",
            ),
        );
        Ok(())
    });
}

#[rstest]
fn a_forgotten_cork_holds_back_for_200_ms(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "When does a cork that nobody pulls let go?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, &["--how", "forgotten"])?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["flags:waitall", "recv:600", "close"])?;
        demo.ending()?;
        let wire = capture.finish()?;
        lab.claim("the three pieces are one segment all the same", wire.ladder(port, ONE));
        let held = held_back(wire.at("server").flow(port)?);
        lab.claim(
            format!("it left 180 to 1000 ms after the handshake: {held:?} (Linux 6.18: 200)"),
            held.is_some_and(|ms| (180..1000).contains(&ms)),
        );
        Ok(())
    });
}

#[rstest]
fn a_close_does_not_wait_for_the_cork(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "Does close() wait for a cork that nobody pulled?", |lab| {
        let port = lab.port()?;
        let demo = demo(lab, family, port, &["--how", "close"])?;
        let capture = lab.capture()?;
        connecting(lab, family, port, &["recv-all", "close"])?;
        demo.ending()?;
        let wire = capture.finish()?;
        lab.claim(
            "the pieces and the FIN are one segment",
            wire.ladder(
                port,
                "client > server  S
                 server > client  S.
                 client > server  .
                 server > client  FP.  1:601
                 client > server  F.  seq 1 ack 602",
            ),
        );
        let held = held_back(wire.at("server").flow(port)?);
        lab.claim(
            format!("it left before a cork would have let go, 180 ms: {held:?}"),
            held.is_some_and(|ms| ms < 180),
        );
        Ok(())
    });
}

#[rstest]
fn a_cork_fills_segments(#[values(Family::V4, Family::V6)] family: Family) {
    experiment!(family, "What does a cork do to 100 and 4000 bytes?", |lab| {
        let mut firsts = Vec::new();
        let capture = lab.capture()?;
        let ports = [lab.port()?, lab.port()?];
        for (how, port) in ["cork", "nodelay"].into_iter().zip(ports) {
            let demo = demo(lab, family, port, &["--how", how, "--pieces", "100,4000"])?;
            connecting(lab, family, port, &["flags:waitall", "recv:4100", "close"])?;
            demo.ending()?;
        }
        let wire = capture.finish()?;
        for port in ports {
            let ranges = wire.at("server").flow(port)?.ranges(Side::Server);
            let lengths: Vec<i64> = ranges.iter().map(|range| range.end - range.start).collect();
            let (last, full) = lengths.split_last().map_or((0, &[][..]), |(l, f)| (*l, f));
            firsts.push(lengths.first().copied().unwrap_or(0));
            if port == ports[0] {
                lab.claim(
                    format!("corked: full segments of one size, and a shorter last: {lengths:?}"),
                    full.iter().all(|length| *length == full[0] && *length > last)
                        && full.first().is_some_and(|length| *length > 1000)
                        && lengths.iter().sum::<i64>() == 4100,
                );
            } else {
                lab.claim_eq("not corked: the first is the first piece", lengths[0], 100);
            }
        }
        Ok(())
    });
}
