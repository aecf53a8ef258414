//! A link on which things go wrong: frames of TCP are lost, doubled and overtaken, in both directions.
#![forbid(unsafe_code)]

use std::{
    io::{self, Read as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::Socket;

use crate::{netns::Netns, wire::packet_socket};

/// How often what goes wrong: of a thousand frames of TCP, in each direction.
#[derive(Clone, Copy, Debug)]
pub struct Trouble {
    /// Never arrive.
    pub lost: u64,
    /// Arrive twice, the second time perhaps much later.
    pub doubled: u64,
    /// Are overtaken by others.
    pub late: u64,
    /// Chooses them.
    pub seed: u64,
}

/// What went wrong so far, in both directions.
#[derive(Debug, Default)]
pub struct Troubled {
    /// Frames of TCP.
    pub frames: AtomicU64,
    /// Of these: lost.
    pub lost: AtomicU64,
    /// Doubled.
    pub doubled: AtomicU64,
    /// Overtaken, or so late that they could have been.
    pub late: AtomicU64,
}

/// A namespace between two others that carries frames from one to the other. Dropping it ends that, and removes it.
#[derive(Debug)]
pub struct Link {
    stop: Arc<AtomicBool>,
    troubled: Arc<Troubled>,
    carriers: Vec<JoinHandle<()>>,
    middle: Netns,
}

/// The interfaces in the middle.
const ENDS: [&str; 2] = ["left", "right"];
/// A frame that waits for others to overtake it waits for so long instead where there are none.
const TICK: Duration = Duration::from_millis(2);
/// `struct virtio_net_hdr`, in front of every frame.
const VNET_HEADER: usize = 10;

impl Link {
    /// Links an interface of each of two namespaces, with these addresses.
    ///
    /// Checksums and segments are the work of the kernels at its ends, so that frames are as on a wire.
    ///
    /// # Panics
    /// Without root.
    pub fn new(ends: [(&Netns, &str, &[&str]); 2], trouble: Trouble) -> Self {
        let middle = Netns::new("middle");
        for which in ["all", "default"] {
            middle.sysctl(&format!("net.ipv6.conf.{which}.disable_ipv6"), "1");
        }
        for ((netns, interface, addresses), inner) in ends.into_iter().zip(ENDS) {
            netns.link(interface, addresses, &middle, inner, &[]);
            whole_frames(netns, interface);
            whole_frames(&middle, inner);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let troubled = Arc::new(Troubled::default());
        let socket = |end| packet_socket(&middle, end, true).expect("a packet socket");
        let [left, right] = ENDS.map(|end| Arc::new(socket(end)));
        let pairs = [(Arc::clone(&left), Arc::clone(&right)), (right, left)];
        let carriers = (1..).zip(pairs).map(|(direction, (from, to))| {
            let (stop, troubled) = (Arc::clone(&stop), Arc::clone(&troubled));
            // Xorshift must not begin with 0.
            let random = trouble.seed.wrapping_mul(2).wrapping_add(direction) | 1 << 63;
            let mut carrier = Carrier { to, trouble, troubled, random, waiting: Vec::new() };
            thread::spawn(move || carrier.run(&from, &stop))
        });
        Self { carriers: carriers.collect(), stop, troubled, middle }
    }

    /// What went wrong so far.
    pub fn troubled(&self) -> &Troubled {
        &self.troubled
    }

    /// The namespace in the middle.
    pub fn middle(&self) -> &Netns {
        &self.middle
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ends: Vec<_> = self.carriers.drain(..).map(JoinHandle::join).collect();
        assert!(thread::panicking() || ends.iter().all(Result::is_ok), "a carrier of the link has panicked");
    }
}

/// Has the kernel sum and cut by itself, and believe nobody's sum.
fn whole_frames(netns: &Netns, interface: &str) {
    let off = ["rx", "tx", "tso", "gso", "gro"].into_iter().flat_map(|what| [what, "off"]);
    let output = netns.command("ethtool").args(["-K", interface]).args(off).output().expect("ethtool runs");
    assert!(output.status.success(), "ethtool -K {interface}: {output:?}");
}

/// One direction.
struct Carrier {
    to: Arc<Socket>,
    trouble: Trouble,
    troubled: Arc<Troubled>,
    random: u64,
    /// Frames, and for how many others or ticks they wait.
    waiting: Vec<(u64, Vec<u8>)>,
}

impl Carrier {
    fn run(&mut self, from: &Socket, stop: &AtomicBool) {
        from.set_read_timeout(Some(TICK)).expect("a time limit");
        let mut buffer = vec![0; 80_000];
        let mut from = from;
        while !stop.load(Ordering::Acquire) {
            match from.read(&mut buffer) {
                Ok(length) if is_tcp(&buffer[..length]) => self.carry(&buffer[..length]),
                Ok(length) => self.send(&buffer[..length]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => panic!("receiving on the link: {e}"),
            }
            self.release();
        }
    }

    fn carry(&mut self, frame: &[u8]) {
        let Trouble { lost, doubled, late, .. } = self.trouble;
        self.troubled.frames.fetch_add(1, Ordering::Relaxed);
        let counter = match self.next(1000) {
            n if n < lost => &self.troubled.lost,
            n if n < lost + doubled => {
                self.send(frame);
                let wait = 1 + self.next(30);
                self.waiting.push((wait, frame.to_vec()));
                &self.troubled.doubled
            }
            n if n < lost + doubled + late => {
                let wait = 2 + self.next(4);
                self.waiting.push((wait, frame.to_vec()));
                &self.troubled.late
            }
            _ => return self.send(frame),
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Sends what has waited for long enough.
    fn release(&mut self) {
        for (wait, _) in &mut self.waiting {
            *wait -= 1;
        }
        let waiting = std::mem::take(&mut self.waiting);
        let (ready, waiting) = waiting.into_iter().partition(|(wait, _)| *wait == 0);
        self.waiting = waiting;
        let ready: Vec<(u64, Vec<u8>)> = ready;
        for (_, frame) in ready {
            self.send(&frame);
        }
    }

    fn send(&self, frame: &[u8]) {
        loop {
            match (&*self.to).write(frame) {
                Ok(_) => return,
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                // The other end is being taken down.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENETDOWN | libc::ENXIO)) => return,
                Err(e) => panic!("sending {} bytes on the link: {e}", frame.len()),
            }
        }
    }

    /// A number below `limit` (xorshift).
    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }
}

/// What finds the neighbours must not be lost: that is not what is tried.
fn is_tcp(frame: &[u8]) -> bool {
    let at = |offset: usize| frame.get(VNET_HEADER + offset).copied();
    match (at(12), at(13)) {
        (Some(0x08), Some(0x00)) => at(23) == Some(6),
        (Some(0x86), Some(0xdd)) => at(20) == Some(6),
        _ => false,
    }
}
