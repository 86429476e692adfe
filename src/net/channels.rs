//! The channels between a parent that passes connections and its children: who is free, who is next.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::unistd::read;

use crate::net::passing;

/// The parent's ends of the channels, a place each. A child writes a byte when it is free again.
#[derive(Debug)]
pub struct Channels {
    places: Vec<Option<Channel>>,
    last: usize,
}

#[derive(Debug)]
struct Channel {
    end: OwnedFd,
    free: bool,
}

/// Which free child gets the next connection.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Assign {
    /// The first in order (Stevens)
    #[default]
    FirstFree,
    /// The first in order after the one that got the last
    RoundRobin,
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// A signal.
    Signal(Signal),
    /// A client, and there is a child who is free.
    Client,
    /// Nothing of interest.
    Nothing,
}

impl Channels {
    /// So many places, all without a channel.
    pub fn new(places: usize) -> Channels {
        Channels { places: (0..places).map(|_| None).collect(), last: places - 1 }
    }

    /// Makes a channel for a new child, who is free; returns the child's end.
    ///
    /// # Errors
    /// socketpair(2)'s.
    pub fn open(&mut self, place: usize) -> io::Result<OwnedFd> {
        let (ours, its) = passing::pair()?;
        self.places[place] = Some(Channel { end: ours, free: true });
        Ok(its)
    }

    /// Closes one of our ends.
    pub fn close(&mut self, place: usize) {
        self.places[place] = None;
    }

    /// Closes all of our ends.
    pub fn close_all(&mut self) {
        self.places.clear();
    }

    /// Takes the next free child by this rule: its place and the channel to it. It is not free then.
    pub fn take_free(&mut self, assign: Assign) -> Option<(usize, BorrowedFd<'_>)> {
        let count = self.places.len();
        let first = if assign == Assign::FirstFree { 0 } else { self.last + 1 };
        let is_free = |place: &usize| self.places[*place].as_ref().is_some_and(|c| c.free);
        let place = (first..first + count).map(|place| place % count).find(is_free)?;
        self.last = place;
        let channel = self.places[place].as_mut()?;
        channel.free = false;
        Some((place, channel.end.as_fd()))
    }

    /// poll(2): waits for a signal, a child that is free again, or, if one is free, a client. With
    /// none free, clients wait in the listener's queue.
    ///
    /// # Errors
    /// poll(2)'s, and those of reading the signal.
    pub fn wait(&mut self, signals: &SignalFd, listener: impl AsFd) -> nix::Result<Came> {
        let free = self.places.iter().flatten().any(|channel| channel.free);
        let wanted = if free { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        fds.push(PollFd::new(listener.as_fd(), wanted));
        let busy = self.places.iter().flatten().filter(|channel| !channel.free);
        fds.extend(busy.map(|channel| PollFd::new(channel.end.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::from(1000u16))?; // a place that could not be filled is tried again
        let mut came = fds.iter().map(|fd| fd.any() == Some(true)).collect::<Vec<_>>().into_iter();
        let (signal, client) = (came.next() == Some(true), came.next() == Some(true));
        let busy = self.places.iter_mut().flatten().filter(|channel| !channel.free);
        for (channel, _) in busy.zip(came).filter(|(_, came)| *came) {
            channel.free = read(&channel.end, &mut [0]) == Ok(1); // 0: it died, and SIGCHLD tells
        }
        if signal && let Some(signal) = signals.read_signal()? {
            let signal = Signal::try_from(signal.ssi_signo as i32)?;
            return Ok(Came::Signal(signal));
        }
        Ok(if client { Came::Client } else { Came::Nothing })
    }
}
