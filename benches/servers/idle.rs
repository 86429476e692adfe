//! Connections that are there and say nothing.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::ensure;

use super::load::{Load, PATIENCE, address};

/// Idle connections are made and tried so many at a time: less than a backlog.
const BATCH: usize = 500;

/// Each has had an answer of one byte: it has been accepted, whatever queue it came through.
pub(crate) fn open(load: &Load) -> anyhow::Result<Vec<TcpStream>> {
    let mut idle = Vec::with_capacity(load.idle);
    while idle.len() < load.idle {
        let batch = BATCH.min(load.idle - idle.len());
        let connect = |number| {
            let stream = TcpStream::connect(address(load.port, number))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok::<_, std::io::Error>(stream)
        };
        let mut batch = (0..batch as u64).map(connect).collect::<Result<Vec<_>, _>>()?;
        ensure!(alive(&mut batch) == batch.len(), "{} connections, and no answer", idle.len());
        idle.append(&mut batch);
    }
    Ok(idle)
}

/// How many of them have no answer any more.
pub(crate) fn lost(connections: &mut [TcpStream]) -> usize {
    connections.chunks_mut(BATCH).map(|batch| batch.len() - alive(batch)).sum()
}

/// How many of these have an answer.
fn alive(connections: &mut [TcpStream]) -> usize {
    let asked: Vec<bool> = connections.iter_mut().map(|c| c.write_all(b"1\n").is_ok()).collect();
    let answered = connections.iter_mut().map(|c| c.read_exact(&mut [0]).is_ok());
    answered.zip(asked).filter(|(answered, asked)| *answered && *asked).count()
}
