//! Segments of connections that were deferred or are observed: what a connection opens with, and whose it is.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use preflightd_common::{
    abi::{Config, Pending, Sample, TICK_SHIFT, config_flags, event, host_kind, kind, options, stage, state},
    cookie,
    decide::verdict,
    preflight::{self, HostHash, Scan, mark},
    tcp::{Options, flags},
    words::LOOKED_AT,
};

use crate::{
    NEXT, answer, answered, handshake,
    maps::{self, HostWalk, Scratch},
    packet::{self, Packet},
    reply::sent,
    sockets::{self, Given, Meets},
};

const SHOT: i32 = TC_ACT_SHOT;
/// The kernel has looked at a segment so many ticks after this program has at the latest.
const SETTLED: u32 = 2;
/// A connection that the kernel did not make is given again within so many ticks (4 s: two retransmissions at least).
const AGAIN: u32 = 4 << 10;
const ENOMEM: i32 = -12;
/// No worker can take it now. A number, as [`sent`] says.
pub(crate) const NOBODY: i32 = -102;

/// A segment without SYN to a served port. `deferring`: this is the program that defers.
#[inline(always)]
pub(crate) fn segment(skb: *mut __sk_buff, packet: &Packet, deferring: bool) -> i32 {
    if maps::is_settled(&packet.flow) {
        return settled(skb, packet);
    }
    let Some(pending) = maps::pending(&packet.flow) else {
        // Only behind the other: a connection that goes from there to here is at any time in one of them.
        if deferring && let Some(answered) = maps::answered(&packet.flow) {
            // SAFETY: as below.
            return answered::segment(skb, packet, unsafe { &mut *answered });
        }
        return without_entry(skb, packet, deferring);
    };
    // SAFETY: packets of one connection come one after the other but for odd cases, in which one of them wins.
    let pending = unsafe { &mut *pending };
    match pending.stage {
        stage::OBSERVED => observed(skb, packet, pending),
        _ if !deferring => NEXT,
        stage::DEFERRED | stage::ACKNOWLEDGED => waiting(skb, packet, pending),
        _ => given(skb, packet, pending, false),
    }
}

/// Bytes from the first one that the client may send.
#[inline(always)]
pub(crate) fn offset(packet: &Packet, pending: &Pending) -> u32 {
    packet.seq.wrapping_sub(pending.client_isn).wrapping_sub(1)
}

/// A connection of the kernel's: counts what it opens with. Nothing is touched.
#[inline(never)]
fn observed(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending) -> i32 {
    if packet.flags & flags::ACK == 0 || offset(packet, pending) != 0 {
        return NEXT;
    }
    let row = u32::from(pending.row);
    if packet.data == 0 {
        if packet.flags & (flags::FIN | flags::RST) != 0 {
            maps::count_port(row, kind::Silent);
            maps::forget(&packet.flow);
        } else if pending.server_isn == 0 {
            pending.server_isn = packet.ack;
        } else if pending.server_isn != packet.ack {
            // It has acknowledged data before it has sent any.
            maps::count_port(row, kind::ServerFirst);
            maps::forget(&packet.flow);
        }
        return NEXT;
    }
    // Counts only what is surely a connection: anybody can send a SYN and data from anywhere.
    if sockets::meets(skb, packet, None) == Meets::Established {
        let spoken = pending.server_isn != 0 && pending.server_isn != packet.ack;
        let mut opens = if spoken { kind::ServerFirst } else { opening(skb, packet) };
        if opens == kind::Options {
            if may_be_answered(skb, packet) {
                opens = kind::Preflight;
            }
            show(skb, packet);
        }
        maps::count_port(row, opens);
    }
    maps::forget(&packet.flow);
    NEXT
}

/// Our SYN-ACK is out, and nobody has the connection yet.
#[inline(never)]
fn waiting(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending) -> i32 {
    let offset = offset(packet, pending);
    if packet.flags & flags::RST != 0 {
        if offset == 0 {
            maps::count(event::ClientReset);
            maps::count_port(u32::from(pending.row), kind::Silent);
            maps::forget(&packet.flow);
        }
        return NEXT;
    }
    if packet.flags & flags::SYN != 0 {
        // Also our own, that ends a TIME_WAIT (`handshake::end_time_wait`).
        return NEXT;
    }
    if packet.flags & flags::ACK == 0 {
        return SHOT;
    }
    if packet.ack != pending.server_isn.wrapping_add(1) {
        maps::count(event::BadNumbers);
        return NEXT;
    }
    let Some(config) = maps::config() else { return NEXT };
    let now = maps::now();
    pending.touched = (now >> TICK_SHIFT) as u32;
    if offset == u32::MAX && packet.data <= 1 {
        return handshake::keepalive(skb, packet, pending, config.window);
    }
    let speaks = packet.data != 0 || packet.flags & flags::FIN != 0;
    if offset != 0 {
        if speaks {
            maps::count(event::OutOfOrder);
        }
        return SHOT;
    }
    if speaks {
        return first(skb, packet, pending, config, now);
    }
    if maps::may_wait(config, &packet.flow, now) {
        pending.stage = stage::ACKNOWLEDGED;
        maps::count(event::Ack);
        return SHOT;
    }
    // Nobody would look at its first data: the proxy gets it at once, as without us.
    give_to_proxy(skb, packet, pending)
}

/// The first data, or the end without any.
#[inline(always)]
fn first(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending, config: &Config, now: u64) -> i32 {
    let row = u32::from(pending.row);
    if packet.data == 0 {
        maps::count_port(row, kind::Silent);
        return give_to_proxy(skb, packet, pending);
    }
    let mut opens = opening(skb, packet);
    if opens != kind::Options {
        maps::count_port(row, opens);
        return give_to_proxy(skb, packet, pending);
    }
    let judged = answer::judge(skb, packet, config, now);
    if judged == verdict::ANSWER {
        let verdict = answered::begin(skb, packet, pending);
        if verdict != sent::UNTOUCHED {
            maps::count_port(row, kind::Preflight);
            return verdict;
        }
    }
    if judged == verdict::PROXY {
        maps::count_port(row, kind::Preflight);
        show(skb, packet);
        let verdict = give_to_proxy(skb, packet, pending);
        if pending.stage == stage::GIVEN {
            maps::count_outcome();
        }
        return verdict;
    }
    if may_be_answered(skb, packet) {
        opens = kind::Preflight;
    } else {
        show(skb, packet);
    }
    maps::count_port(row, opens);
    if opens == kind::Preflight && maps::may_wait(config, &packet.flow, now) {
        let verdict = give_to_worker(skb, packet, pending, now);
        if verdict != NOBODY {
            return verdict;
        }
    }
    give_to_proxy(skb, packet, pending)
}

/// Shows the daemon a segment that begins with OPTIONS and goes to the proxy, if it wants to see any. Nothing of the
/// connection is touched.
///
/// Called, not copied in: what it needs of the stack others need too.
#[inline(never)]
fn show(skb: *mut __sk_buff, packet: &Packet) {
    let (Some(config), Some(service)) = (maps::config(), maps::service(&packet.flow)) else { return };
    let length = packet.data & 2047;
    // A longer one is no plain preflight.
    if config.samples == 0 || length == 0 || length != packet.data || !maps::take_sample(config, maps::now())
    {
        return;
    }
    let Some(mut place) = maps::SAMPLES.reserve::<Sample>(0) else { return };
    let sample = place.as_mut_ptr();
    // SAFETY: the ring has room for a whole sample there, until it is submitted or discarded.
    let (listener, told, bytes) =
        unsafe { (&mut (*sample).listener, &mut (*sample).length, &mut (*sample).bytes) };
    *listener = service.listener;
    *told = length;
    if packet::load_part(skb, packet.data_at(), bytes, length) {
        place.submit(0);
    } else {
        place.discard(0);
    }
}

/// A listener was chosen: has the kernel made the connection? `answered`: its entry is in `ANSWERED`.
///
/// Called, not copied in: twice is too much for the verifier.
#[inline(never)]
pub(crate) fn given(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending, answered: bool) -> i32 {
    if !matches!(sockets::meets(skb, packet, None), Meets::Listener(_)) {
        // It has, or there is nothing left of it.
        forget(packet, answered);
        return NEXT;
    }
    let offset = offset(packet, pending);
    let right = packet.flags & (flags::ACK | flags::SYN | flags::RST) == flags::ACK
        && packet.ack == pending.server_isn.wrapping_add(1);
    if !right {
        if packet.flags & flags::RST != 0 {
            forget(packet, answered);
        }
        return NEXT;
    }
    let speaks = packet.data != 0 || packet.flags & flags::FIN != 0;
    let since = ((maps::now() >> TICK_SHIFT) as u32).wrapping_sub(pending.touched);
    if offset == 0 && speaks {
        if since > AGAIN {
            // What was served and is gone must not be served a second time: the kernel resets it.
            forget(packet, answered);
            return NEXT;
        }
        // Not yet: there was no room. The worker had its chance.
        maps::count(event::GivenAgain);
        return give_to_proxy(skb, packet, pending);
    }
    // A list of packets comes here before any of them goes on (`netif_receive_skb_list`): the connection is about to be
    // made from the first one.
    if since <= SETTLED {
        return NEXT;
    }
    maps::count(event::OutOfOrder);
    SHOT
}

#[inline(always)]
fn forget(packet: &Packet, answered: bool) {
    if answered {
        maps::forget_answered(&packet.flow);
    } else {
        maps::forget(&packet.flow);
    }
}

/// What nearly every packet is: of a connection that waits for nothing.
#[inline(always)]
fn settled(skb: *mut __sk_buff, packet: &Packet) -> i32 {
    if packet.data >= 8 && maps::config().is_some_and(|config| config.state == state::OBSERVE) {
        count_pooled(skb, packet);
    }
    NEXT
}

/// No entry: settled from now on, unless entries are being evicted, and this was perhaps one of them.
#[inline(never)]
fn without_entry(skb: *mut __sk_buff, packet: &Packet, deferring: bool) -> i32 {
    let Some(config) = maps::config() else { return NEXT };
    if deferring && config.flags & config_flags::PRESSURE != 0 {
        let wanted = flags::ACK | flags::SYN | flags::RST;
        if packet.flags & wanted != flags::ACK {
            return NEXT;
        }
        if matches!(sockets::meets(skb, packet, None), Meets::Listener(_)) {
            return evicted(skb, packet, config);
        }
    }
    maps::settle(&packet.flow);
    settled(skb, packet)
}

/// OPTIONS on a connection that began with something else.
#[inline(always)]
fn count_pooled(skb: *mut __sk_buff, packet: &Packet) {
    let mut first = 0_u64;
    if packet::load(skb, packet.data_at(), &mut first)
        && first == u64::from_ne_bytes(*preflight::METHOD)
        && let Some(service) = maps::service(&packet.flow)
    {
        maps::count_port(service.row, kind::Pooled);
    }
}

/// A listener would get it while entries are being evicted. If its cookie is good it gets its entry back.
#[inline(never)]
fn evicted(skb: *mut __sk_buff, packet: &Packet, config: &Config) -> i32 {
    let now = maps::now();
    if !maps::take_cookie(config, now) {
        maps::count(event::CookieBudget);
        return NEXT;
    }
    let (client_isn, server_isn) = (packet.seq.wrapping_sub(1), packet.ack.wrapping_sub(1));
    let flow = &packet.flow;
    let good = match cookie::check(maps::key(config.key), flow, client_isn, now, server_isn) {
        Some(good) => Some(good),
        None => cookie::check(maps::key(config.key ^ 1), flow, client_isn, now, server_isn),
    };
    let (Some(good), Some(service), Some(sent)) = (good, maps::service(flow), packet.options(skb)) else {
        maps::count(event::CookieBad);
        return NEXT;
    };
    maps::count(event::CookieGood);
    let mut pending = Pending {
        client_isn,
        server_isn,
        touched: (now >> TICK_SHIFT) as u32,
        mss: good.mss,
        client_scale: good.scale,
        server_scale: handshake::scaled(good.options, config.window_scale as u8),
        options: good.options | sent.present & options::TIMESTAMPS,
        stage: stage::ACKNOWLEDGED,
        row: service.row as u16,
    };
    if packet.data == 0 && packet.flags & flags::FIN == 0 {
        let _ = maps::remember(&packet.flow, &pending, true);
        return SHOT;
    }
    // The proxy's: there is no time to be choosy. What it has no room for now comes again, and must be known then; what it
    // takes is the kernel's from here on.
    let verdict = give_to_proxy(skb, packet, &mut pending);
    if verdict == SHOT {
        let _ = maps::remember(&packet.flow, &pending, true);
    }
    verdict
}

/// The column of `PORT_COUNTS` for what a connection opens with, before the head of an OPTIONS is looked at.
#[inline(always)]
fn opening(skb: *mut __sk_buff, packet: &Packet) -> u32 {
    let mut first = [0_u8; 8];
    let length = if packet.data < 8 { packet.data & 7 } else { 8 };
    if length == 0 || !packet::load_part(skb, packet.data_at(), &mut first, length) {
        return kind::Other;
    }
    preflight::opening(u64::from_le_bytes(first), packet.data)
}

unsafe extern "C" fn scan_step(_: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: `repeat` hands over what it was given.
    let scratch = unsafe { &mut **scratch };
    i64::from(!scratch.scan.step(&scratch.head))
}

/// Whether a head that begins with OPTIONS looks like a preflight that a worker may answer. The hash of its request line
/// lies in the scratch then.
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
pub(crate) fn may_be_answered(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let (Some(service), Some(scratch)) = (maps::service(&packet.flow), maps::scratch()) else { return false };
    let length = if packet.data > LOOKED_AT as u32 { LOOKED_AT as u32 } else { packet.data };
    let bounded = length & 2047;
    if bounded == 0 || !packet::load_part(skb, packet.data_at(), &mut scratch.head, bounded) {
        return false;
    }
    scratch.scan = Scan::new(bounded);
    maps::repeat(preflight::MAX_STEPS, scan_step, scratch);
    // Only the origin-form (RFC 9112 §3.2.1).
    if scratch.head[8] != b'/' || !scratch.scan.may_be_answered(packet.data) {
        return false;
    }
    has_host(scratch, service.listener)
}

unsafe extern "C" fn host_step(index: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: as in `scan_step`.
    let Scratch { host, head, .. } = unsafe { &mut **scratch };
    if index >= host.length {
        return 1;
    }
    let byte = head[(host.end.wrapping_sub(index).wrapping_sub(1) & 2047) as usize];
    host.hash.take(byte);
    if host.hash.ends_as_address(byte) {
        host.address = 1;
    }
    if byte == b'.' && host.address == 0 && maps::has_host(host.listener, host_kind::SUFFIX, host.hash.value)
    {
        host.known = 1;
        return 1;
    }
    0
}

/// Whether some policy of the listener has the host.
#[inline(always)]
fn has_host(scratch: &mut Scratch, listener: u32) -> bool {
    const LONGEST: u32 = 255;
    let byte = |at: u32| scratch.head[(at & 2047) as usize];
    let (mut start, mut end) = (scratch.scan.host, scratch.scan.host_end);
    if byte(start) == b' ' {
        start += 1;
    }
    if byte(end.wrapping_sub(1)) == b'\r' {
        end -= 1;
    }
    if end <= start || end - start > LONGEST {
        return false;
    }
    scratch.host =
        HostWalk { hash: HostHash::new(), end, length: end - start, listener, known: 0, address: 0 };
    maps::repeat(LONGEST, host_step, scratch);
    let host = &scratch.host;
    // Of addresses only those that are named: any other one is somebody else's.
    host.known != 0
        || maps::has_host(listener, host_kind::EXACT, host.hash.value)
        || (host.address == 0 && maps::has_host(listener, host_kind::ANY, 0))
}

/// Gives a preflight that [`may_be_answered`] to a worker; [`NOBODY`]: none can take it now, or one had to turn it away.
///
/// Called, not copied in: twice is too much for the verifier.
#[inline(never)]
pub(crate) fn give_to_worker(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending, now: u64) -> i32 {
    let (Some(service), Some(scratch)) = (maps::service(&packet.flow), maps::scratch()) else {
        return NOBODY;
    };
    if maps::is_marked(mark(scratch.scan.line, &packet.flow.client), now) {
        maps::count(event::Marked);
        return NOBODY;
    }
    if service.sockets == 0 {
        return NOBODY;
    }
    let Some(segment) = packet.options(skb) else { return NOBODY };
    let port = u32::from(u16::from_be(packet.flow.client_port));
    let spread = (port ^ packet.flow.client[3]).wrapping_mul(0x9e37_79b1) >> 16;
    let worker = maps::worker(service.first_socket + spread % service.sockets);
    match sockets::give_to_worker(skb, worker, &mut sockets::attributes(pending, &segment)) {
        Given::Yes => {
            if pending.stage < stage::GIVEN {
                maps::count_port(u32::from(pending.row), kind::Worker);
            }
            pending.stage = stage::GIVEN_TO_WORKER;
            NEXT
        }
        Given::Gone => {
            maps::count(event::WorkerGone);
            NOBODY
        }
        Given::Full => {
            maps::count(event::WorkerFull);
            NOBODY
        }
        Given::Refused(_) => {
            maps::count(event::AssignFailed);
            NOBODY
        }
    }
}

/// Gives a segment to the proxy. What it has no room for comes again.
///
/// Called, not copied in: so many times is too much for the verifier.
#[inline(never)]
pub(crate) fn give_to_proxy(skb: *mut __sk_buff, packet: &Packet, pending: &mut Pending) -> i32 {
    let segment: Options = match packet.options(skb) {
        Some(segment) => segment,
        None => return SHOT,
    };
    match sockets::give_to_proxy(skb, packet, &mut sockets::attributes(pending, &segment)) {
        Given::Yes => {
            if pending.stage < stage::GIVEN {
                maps::count_port(u32::from(pending.row), kind::Proxy);
            }
            pending.stage = stage::GIVEN;
            NEXT
        }
        // Short of memory, or of room: the client sends it again, as without us.
        Given::Refused(ENOMEM) => {
            maps::count(event::AssignFailed);
            SHOT
        }
        Given::Full => {
            maps::count(event::ProxyFull);
            SHOT
        }
        // It has stopped listening, or listens in another way: the client learns it by a reset.
        Given::Refused(_) => {
            maps::count(event::AssignFailed);
            NEXT
        }
        Given::Gone => NEXT,
    }
}
