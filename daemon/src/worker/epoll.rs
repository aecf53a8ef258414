//! The epoll engine, for where io_uring is switched off: the same connections, the same behaviour.
//!
//! Sockets are registered once, edge-triggered, for both directions; a connection remembers which of them may still
//! have something and goes on until neither has. Listeners are level-triggered, so that pausing is a plain change.
#![forbid(unsafe_code)]

use super::{
    Serves, WorkerListener,
    connection::{Connection, Step},
    shared::{ACCEPT_BACKOFF, HANDOFF_RETRY, Shared},
};
use crate::{policy::ListenerId, reason::PassReason, relay::Handoff};
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, SocketFlags},
};
use std::{io, mem, os::fd::OwnedFd, time::Duration};

/// Events of one batch.
const EVENTS: usize = 256;

/// Connections taken from one listener before others get their turn.
const ACCEPTS: usize = 64;

/// Steps of one connection before others get their turn.
const TURN: usize = 32;

/// Above the numbers of connections: listeners, and what wakes the worker.
const LISTENER: u64 = 1 << 62;
const TABLE: u64 = 1 << 63;
const STOP: u64 = TABLE + 1;

#[derive(Debug)]
struct Entry {
    connection: Connection,
    socket: Option<OwnedFd>,
    /// So that an event for an earlier connection of the same number is known as such.
    generation: u32,
    readable: bool,
    writable: bool,
    /// The client has shut its side: reading goes on until the end of file.
    hung_up: bool,
}

#[derive(Debug)]
struct Listener {
    id: ListenerId,
    serves: Serves,
    socket: Option<OwnedFd>,
    watched: bool,
}

/// A worker on epoll.
#[derive(Debug)]
pub(super) struct Epoll {
    queue: OwnedFd,
    entries: Vec<Entry>,
    free: Vec<u32>,
    listeners: Vec<Listener>,
    /// Connections whose turn was over before their work.
    unfinished: Vec<u32>,
    next_tick: u64,
    accept_after: u64,
    capped: bool,
    shared: Shared,
}

impl Epoll {
    /// Registers the listeners.
    pub(super) fn new(listeners: Vec<WorkerListener>, shared: Shared) -> io::Result<Self> {
        let queue = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&queue, shared.tables.wake_fd(), EventData::new_u64(TABLE), EventFlags::IN)?;
        epoll::add(&queue, &shared.stop.wake, EventData::new_u64(STOP), EventFlags::IN | EventFlags::ET)?;
        let listeners = listeners
            .into_iter()
            .enumerate()
            .map(|(index, WorkerListener { id, socket, serves })| {
                rustix::io::ioctl_fionbio(&socket, true)?;
                epoll::add(&queue, &socket, EventData::new_u64(LISTENER + index as u64), EventFlags::IN)?;
                Ok(Listener { id, serves, socket: Some(socket), watched: true })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            queue,
            entries: Vec::new(),
            free: Vec::new(),
            listeners,
            unfinished: Vec::new(),
            next_tick: 0,
            accept_after: 0,
            capped: false,
            shared,
        })
    }

    /// Runs until it is told to stop and all connections have ended.
    ///
    /// # Errors
    /// epoll itself failed.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        while !self.finished() {
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(&self.queue, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("epoll_wait failed: {error}")));
                }
            }
            self.shared.clock.read();
            for slot in mem::take(&mut self.unfinished) {
                self.drive(slot as usize);
            }
            for event in &events {
                self.event(event);
            }
            self.shared.note_latency_now();
            if self.next_tick <= self.shared.clock.now {
                self.next_tick = self.shared.clock.now + self.shared.tick().as_millis() as u64;
                self.expire();
            }
            self.watch_listeners();
            self.shared.retry_handoffs();
        }
        Ok(())
    }

    fn finished(&self) -> bool {
        self.shared.draining.is_some_and(|deadline| {
            (self.shared.live == 0 && !self.shared.handoffs_wait()) || deadline <= self.shared.clock.now
        })
    }

    /// How long to wait for events at most.
    fn timeout(&self) -> Option<Timespec> {
        let longest = if !self.unfinished.is_empty() {
            Duration::ZERO
        } else if self.shared.handoffs_wait() {
            HANDOFF_RETRY
        } else if self.shared.clock.now < self.accept_after {
            ACCEPT_BACKOFF
        } else if self.shared.live > 0 || self.shared.draining.is_some() {
            Duration::from_millis(self.next_tick.saturating_sub(self.shared.clock.now))
        } else {
            return None;
        };
        Timespec::try_from(longest).ok()
    }

    fn event(&mut self, event: &Event) {
        let data = event.data.u64();
        match data {
            TABLE => {
                self.shared.tables.poll();
            }
            STOP => {
                if self.shared.check_stop() {
                    self.begin_drain();
                }
            }
            LISTENER.. => self.accept((data - LISTENER) as usize, ACCEPTS),
            _ => {
                let (generation, slot) = ((data >> 32) as u32, data as u32 as usize);
                let entry = &mut self.entries[slot];
                if entry.socket.is_none() || entry.generation != generation {
                    return;
                }
                let flags = event.flags;
                let over = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
                entry.hung_up |= flags.intersects(over);
                entry.readable |= flags.intersects(EventFlags::IN | over);
                entry.writable |= flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
                self.drive(slot);
            }
        }
    }

    /// Takes up to `most` connections from a listener's queue.
    fn accept(&mut self, index: usize, most: usize) {
        let (id, serves) = (self.listeners[index].id, self.listeners[index].serves);
        for _ in 0..most {
            if self.shared.draining.is_none()
                && (!self.make_room() || self.shared.clock.now < self.accept_after)
            {
                return;
            }
            let Some(socket) = &self.listeners[index].socket else { return };
            let client = match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
            {
                Ok(client) => client,
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(error) => {
                    self.shared.stats.accept_errors.add(1);
                    if error != Errno::CONNABORTED {
                        self.accept_after = self.shared.clock.now + ACCEPT_BACKOFF.as_millis() as u64;
                        return;
                    }
                    continue;
                }
            };
            self.shared.stats.accepted.add(1);
            let slot = self.allocate();
            let entry = &mut self.entries[slot];
            let data = u64::from(entry.generation) << 32 | slot as u64;
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            entry.connection.reset(id, serves);
            entry.readable = true;
            entry.writable = true;
            entry.hung_up = false;
            self.shared.live += 1;
            if epoll::add(&self.queue, &client, EventData::new_u64(data), flags).is_err() {
                entry.connection.fail();
            }
            entry.socket = Some(client);
            self.drive(slot);
        }
        self.make_room();
    }

    /// Keeps within the cap, if need be by closing the longest idle connection. False: none is idle.
    fn make_room(&mut self) -> bool {
        while self.shared.open() > self.shared.limits.max_connections {
            let Some(slot) = self.shared.take_victim() else {
                if !mem::replace(&mut self.capped, true) {
                    self.shared.stats.capped.add(1);
                }
                return false;
            };
            self.shared.stats.capped.add(1);
            self.entries[slot].connection.fail();
            self.drive(slot);
        }
        self.capped = false;
        true
    }

    /// Looks for new connections only while they can be taken.
    fn watch_listeners(&mut self) {
        let full = self.shared.open() > self.shared.limits.max_connections;
        let watch = !full && self.shared.clock.now >= self.accept_after;
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if let Some(socket) = &listener.socket
                && listener.watched != watch
            {
                let flags = if watch { EventFlags::IN } else { EventFlags::empty() };
                let data = EventData::new_u64(LISTENER + index as u64);
                listener.watched = epoll::modify(&self.queue, socket, data, flags).is_ok() == watch;
            }
        }
    }

    /// Does what the connection says until it must wait.
    fn drive(&mut self, slot: usize) {
        for _ in 0..TURN {
            let entry = &mut self.entries[slot];
            let Some(socket) = &entry.socket else { return };
            let connection = &mut entry.connection;
            let step = connection.advance(&self.shared.context());
            if let Some(wait) = connection.timer() {
                self.shared.start_timer(slot, wait);
            }
            match step {
                Step::Read if !entry.readable => return,
                Step::Read => {
                    let space = connection.space();
                    let room = space.len();
                    match rustix::net::recv(socket, space, RecvFlags::empty()) {
                        Ok((n, _)) => {
                            // A short read has emptied the socket (epoll(7)), but the end of file may stand behind.
                            entry.readable = n == room || entry.hung_up;
                            connection.received(n, n == room);
                        }
                        Err(Errno::AGAIN) => entry.readable = false,
                        Err(Errno::INTR) => {}
                        Err(_) => connection.fail(),
                    }
                }
                Step::Send | Step::SendThenRead | Step::SendThenClose if !entry.writable => return,
                Step::Send | Step::SendThenRead | Step::SendThenClose => {
                    let bytes = connection.unsent();
                    // The FIN of the close goes out with the answer.
                    let more = if step == Step::SendThenClose { SendFlags::MORE } else { SendFlags::empty() };
                    match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | more) {
                        Ok(n) => {
                            entry.writable = n == bytes.len();
                            connection.sent(n);
                        }
                        Err(Errno::AGAIN) => entry.writable = false,
                        Err(Errno::INTR) => {}
                        Err(_) => connection.fail(),
                    }
                }
                Step::Shut => match rustix::net::shutdown(socket, Shutdown::Write) {
                    Ok(()) => connection.shut(),
                    Err(_) => connection.fail(),
                },
                Step::HandOver(reason) => return self.hand_over(slot, reason),
                Step::Close => return self.close(slot),
            }
        }
        self.unfinished.push(slot as u32);
    }

    fn hand_over(&mut self, slot: usize, reason: PassReason) {
        let entry = &mut self.entries[slot];
        let Some(client) = entry.socket.take() else { return };
        let listener = entry.connection.listener();
        let (bytes, eof) = entry.connection.take_rest();
        self.release(slot);
        // As the relay's ring wants it: out of this epoll, and blocking.
        let ready =
            epoll::delete(&self.queue, &client).and_then(|()| rustix::io::ioctl_fionbio(&client, false));
        if ready.is_ok() {
            self.shared.hand_over(Handoff { client, listener, bytes, eof, reason });
        } else {
            self.shared.stats.closed.add(1);
        }
    }

    fn close(&mut self, slot: usize) {
        // Closing takes it out of the epoll as well: nobody else has the socket.
        self.entries[slot].socket = None;
        self.shared.stats.closed.add(1);
        self.release(slot);
    }

    fn release(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        entry.generation = entry.generation.wrapping_add(1) & 0x1fff_ffff;
        self.shared.timers.stop(slot);
        self.shared.live -= 1;
        self.free.push(slot as u32);
    }

    fn allocate(&mut self) -> usize {
        if let Some(slot) = self.free.pop() {
            return slot as usize;
        }
        let connection = Connection::new();
        let (readable, writable, hung_up) = (false, false, false);
        self.entries.push(Entry { connection, socket: None, generation: 0, readable, writable, hung_up });
        self.entries.len() - 1
    }

    /// Looks at the timers.
    fn expire(&mut self) {
        let mut from = 0;
        while let Some((slot, wait)) = self.shared.timers.next_expired(from, self.shared.clock.now) {
            from = slot + 1;
            self.entries[slot].connection.timed_out(wait, &self.shared.context());
            self.drive(slot);
        }
    }

    /// Takes what the kernel has accepted, closes the listeners, then the idle connections.
    fn begin_drain(&mut self) {
        for index in 0..self.listeners.len() {
            self.accept(index, usize::MAX);
            self.listeners[index].socket = None;
        }
        let idle: Vec<_> = self.shared.timers.idle().collect();
        for slot in idle {
            // Its next request may be here already: its event comes later in this very batch.
            self.entries[slot].readable = true;
            self.drive(slot);
            if self.shared.timers.is_idle(slot) {
                self.entries[slot].connection.fail();
                self.drive(slot);
            }
        }
    }
}
