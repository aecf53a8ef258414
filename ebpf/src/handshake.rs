//! The deferred handshake: what is said to a client until its first data decides.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_SHOT, bpf_fib_lookup},
    helpers::{bpf_clone_redirect, bpf_fib_lookup as fib_lookup, bpf_l4_csum_replace, bpf_skb_store_bytes},
};
use preflightd_common::{
    abi::{
        Config, Interface, Pending, Service, TICK_SHIFT, config_flags, event, fail_open, kind, options,
        stage, state,
    },
    cookie,
    tcp::{DEFAULT_MSS, Options, Reply, flags},
};

use crate::{
    NEXT, answered, maps,
    packet::{self, Packet},
    reply::{send, sent},
    sockets::{self, Listener, Meets},
};

/// The least MSS with which the kernel makes connections from a cookie (`bpf_sk_assign_tcp_reqsk`).
const LEAST_MSS: [u16; 2] = [1220, 536];
/// The loopback interface of every namespace.
const LOOPBACK: u32 = 1;
const SHOT: i32 = TC_ACT_SHOT;

/// Leaves a new connection to the kernel.
#[inline(always)]
fn leave(reason: u32) -> i32 {
    maps::count_fail_open(reason);
    NEXT
}

/// A SYN in fragments to a served port.
#[inline(always)]
pub(crate) fn fragmented_syn() -> i32 {
    if maps::config().is_some_and(|config| config.state == state::DEFER) {
        maps::count_fail_open(fail_open::IpOptions);
    }
    NEXT
}

/// A SYN to a served port.
///
/// Called, not copied in: what it needs of the stack the other ways need too.
#[inline(never)]
pub(crate) fn syn(skb: *mut __sk_buff, packet: &Packet, deferring: bool) -> i32 {
    let (Some(config), Some(service)) = (maps::config(), maps::service(&packet.flow)) else { return NEXT };
    let now = maps::now();
    if deferring && let Some(pending) = maps::pending(&packet.flow) {
        // SAFETY: as in `verdict::segment`.
        let pending = unsafe { &mut *pending };
        let again = pending.client_isn == packet.seq;
        match pending.stage {
            // Whatever has changed since: an earlier answer may have told its number already.
            stage::DEFERRED | stage::ACKNOWLEDGED if again => {
                return answer_again(skb, packet, config, pending, now);
            }
            // Anybody can send a SYN with these addresses: who is there says so by a reset (RFC 9293 §3.10.7.4).
            stage::ACKNOWLEDGED => return challenge(skb, packet, config, pending),
            _ => {}
        }
    }
    if deferring && let Some(answered) = maps::answered(&packet.flow) {
        // SAFETY: as above.
        let answered = unsafe { &mut *answered };
        if !answered::gives_way(packet, answered) {
            return answered::challenge(skb, packet, answered);
        }
        maps::forget_answered(&packet.flow);
    }
    if config.state == state::OFF {
        return NEXT;
    }
    maps::count(event::Syn);
    maps::count_port(service.row, kind::Syn);
    if !deferring || config.state == state::OBSERVE {
        if maps::take_room(config) {
            observe(packet, service, now);
        }
        return NEXT;
    }
    defer(skb, packet, config, service, now)
}

/// Remembers a connection that the kernel makes, to count what it opens with.
#[inline(always)]
fn observe(packet: &Packet, service: &Service, now: u64) {
    let pending = Pending {
        client_isn: packet.seq,
        touched: (now >> TICK_SHIFT) as u32,
        stage: stage::OBSERVED,
        row: service.row as u16,
        ..Pending::default()
    };
    // Not in place of one that waits. Where the map refuses, a connection is not counted, nothing else.
    let _ = maps::remember(&packet.flow, &pending, false);
}

/// Answers the SYN, or says why not.
#[inline(always)]
fn defer(skb: *mut __sk_buff, packet: &Packet, config: &Config, service: &Service, now: u64) -> i32 {
    if !maps::is_alive(now) {
        return leave(fail_open::Heartbeat);
    }
    if service.engaged == 0 {
        return leave(fail_open::Disengaged);
    }
    // SAFETY: the context.
    let index = unsafe { (*skb).ifindex };
    if index != LOOPBACK && is_martian(packet) {
        return leave(fail_open::Route);
    }
    if config.flags & config_flags::PRESSURE != 0 {
        return leave(fail_open::Pressure);
    }
    if config.percent < 100 && share(packet) >= config.percent {
        return leave(fail_open::Percent);
    }
    if !packet.plain {
        return leave(fail_open::IpOptions);
    }
    let allowed = flags::SYN | flags::ECE | flags::CWR;
    if packet.flags & !allowed != 0 || packet.data != 0 {
        return leave(fail_open::OddSyn);
    }
    if packet.accurate_ecn && config.flags & config_flags::ACCURATE_ECN != 0 {
        return leave(fail_open::OddSyn);
    }
    let Some(interface) = maps::interface(index) else { return leave(fail_open::Interface) };
    let Some(asked) = packet.options(skb) else { return leave(fail_open::OddSyn) };
    if asked.odd != 0 {
        return leave(fail_open::OddSyn);
    }
    let mss = if asked.mss == 0 { DEFAULT_MSS } else { asked.mss };
    if mss < LEAST_MSS[usize::from(packet.v4)] {
        return leave(fail_open::Mss);
    }
    let reuse = match sockets::meets(skb, packet, Some(&asked)) {
        Meets::Listener(Listener::Ready) => false,
        Meets::Listener(Listener::Full) => return leave(fail_open::AcceptQueue),
        Meets::Listener(Listener::Mptcp) => return leave(fail_open::Mptcp),
        Meets::Nothing => return leave(fail_open::NoListener),
        Meets::TimeWait(true) if config.flags & config_flags::TIME_WAIT != 0 => true,
        Meets::TimeWait(_) => return leave(fail_open::TimeWait),
        Meets::Established | Meets::Other => return leave(fail_open::Existing),
    };
    if !leaves_by(skb, packet, config, interface, index) {
        return leave(fail_open::Route);
    }
    answer_syn(skb, packet, config, service, interface, &Asked { options: asked, mss, reuse }, now)
}

/// What a SYN asks for.
struct Asked {
    options: Options,
    mss: u16,
    /// A TIME_WAIT has to give way.
    reuse: bool,
}

#[inline(always)]
fn answer_syn(
    skb: *mut __sk_buff,
    packet: &Packet,
    config: &Config,
    service: &Service,
    interface: &Interface,
    asked: &Asked,
    now: u64,
) -> i32 {
    let agreed = agree(packet, config, &asked.options);
    let key = maps::key(config.key);
    let (scale, mss) = (asked.options.scale, asked.mss);
    let (server_isn, clock_offset) = cookie::make(key, &packet.flow, packet.seq, now, mss, scale, agreed);
    let tick = (now >> TICK_SHIFT) as u32;
    if !maps::take_room(config) {
        return leave(fail_open::Pressure);
    }
    let pending = Pending {
        client_isn: packet.seq,
        server_isn,
        touched: tick,
        mss,
        client_scale: scaled(agreed, scale),
        server_scale: scaled(agreed, config.window_scale as u8),
        options: agreed,
        stage: stage::DEFERRED,
        row: service.row as u16,
    };
    if !maps::remember(&packet.flow, &pending, true) {
        return leave(fail_open::Insert);
    }
    if asked.reuse && !end_time_wait(skb, packet) {
        maps::forget(&packet.flow);
        return leave(fail_open::TimeWait);
    }
    let ts_value = tick.wrapping_add(clock_offset);
    let reply = syn_ack(packet, config, interface, &pending, ts_value, asked.options.ts_value);
    match send(skb, packet, &reply) {
        sent::UNTOUCHED => {
            maps::forget(&packet.flow);
            leave(fail_open::Reply)
        }
        // The client sends its SYN again.
        sent::BROKEN => SHOT,
        verdict => {
            maps::count(event::SynAck);
            if asked.reuse {
                maps::count(event::TimeWaitReused);
            }
            verdict
        }
    }
}

#[inline(always)]
fn syn_ack(
    packet: &Packet,
    config: &Config,
    interface: &Interface,
    pending: &Pending,
    ts_value: u32,
    ts_echo: u32,
) -> Reply {
    let ecn = if pending.options & options::ECN == 0 { 0 } else { flags::ECE };
    Reply {
        seq: pending.server_isn,
        ack: packet.seq.wrapping_add(1),
        flags: flags::SYN | flags::ACK | ecn,
        window: config.window as u16,
        mss: if packet.v4 { interface.mss_v4 } else { interface.mss_v6 },
        scale: pending.server_scale,
        options: pending.options,
        ts_value,
        ts_echo,
    }
}

/// A SYN that was sent again: the same SYN-ACK again.
#[inline(always)]
fn answer_again(
    skb: *mut __sk_buff,
    packet: &Packet,
    config: &Config,
    pending: &mut Pending,
    now: u64,
) -> i32 {
    maps::unsettle(&packet.flow);
    // SAFETY: the context.
    let index = unsafe { (*skb).ifindex };
    let (Some(interface), Some(asked)) = (maps::interface(index), packet.options(skb)) else { return SHOT };
    if !packet.plain {
        return SHOT;
    }
    let (mss, scale) = (pending.mss, pending.client_scale);
    let key = maps::key(config.key);
    let (_, clock_offset) = cookie::make(key, &packet.flow, packet.seq, now, mss, scale, pending.options);
    let tick = (now >> TICK_SHIFT) as u32;
    pending.touched = tick;
    let reply = syn_ack(packet, config, interface, pending, tick.wrapping_add(clock_offset), asked.ts_value);
    match send(skb, packet, &reply) {
        sent::UNTOUCHED | sent::BROKEN => SHOT,
        verdict => {
            maps::count(event::SynAck);
            maps::count(event::SynAgain);
            verdict
        }
    }
}

/// Answers a SYN for a connection that waits already by an acknowledgement: a client that has begun anew resets the old
/// one.
#[inline(always)]
fn challenge(skb: *mut __sk_buff, packet: &Packet, config: &Config, pending: &Pending) -> i32 {
    if !packet.plain {
        return SHOT;
    }
    let reply = Reply {
        seq: pending.server_isn.wrapping_add(1),
        ack: pending.client_isn.wrapping_add(1),
        flags: flags::ACK,
        window: (config.window >> (pending.server_scale & 15)) as u16,
        ..Reply::default()
    };
    match send(skb, packet, &reply) {
        sent::UNTOUCHED | sent::BROKEN => SHOT,
        verdict => {
            maps::count(event::Challenge);
            verdict
        }
    }
}

/// A window scale, if both sides scale.
#[inline(always)]
pub(crate) fn scaled(agreed: u8, scale: u8) -> u8 {
    if agreed & options::WINDOW_SCALE == 0 { 0 } else { scale }
}

/// Options that both sides want, as [`options`].
#[inline(always)]
fn agree(packet: &Packet, config: &Config, asked: &Options) -> u8 {
    let mut agreed = 0;
    if config.flags & config_flags::TIMESTAMPS != 0 {
        agreed |= asked.present & options::TIMESTAMPS;
    }
    if config.flags & config_flags::SACK != 0 {
        agreed |= asked.present & options::SACK;
    }
    if config.flags & config_flags::WINDOW_SCALING != 0 {
        agreed |= asked.present & options::WINDOW_SCALE;
    }
    // RFC 3168 §6.1.1; `tcp_ecn_create_request`.
    let asks = flags::ECE | flags::CWR;
    if config.flags & config_flags::ECN != 0 && packet.flags & asks == asks && packet.ecn == 0 {
        agreed |= options::ECN;
    }
    agreed
}

/// Whether a packet from outside cannot be honest: from nowhere, loopback or many (RFC 1812 §5.3.7, RFC 4291 §2.5), from
/// the address that it goes to, or to loopback.
#[inline(always)]
fn is_martian(packet: &Packet) -> bool {
    let (client, server) = (&packet.flow.client, &packet.flow.server);
    if client[0] == server[0] && client[1] == server[1] && client[2] == server[2] && client[3] == server[3] {
        return true;
    }
    if packet.v4 {
        let [from, ..] = client[3].to_ne_bytes();
        let [to, ..] = server[3].to_ne_bytes();
        return from == 0 || from == 127 || from >= 224 || to == 127;
    }
    let [from, ..] = client[0].to_ne_bytes();
    // `::`, `::1`, and what else no host has.
    let low = |address: &[u32; 4]| address[0] == 0 && address[1] == 0 && address[2] == 0;
    from == 0xff || low(client) || low(server)
}

/// A number below 100 for a connection; the same for each of its SYNs.
#[inline(always)]
fn share(packet: &Packet) -> u32 {
    let flow = &packet.flow;
    let seed = flow.client[3] ^ u32::from(flow.client_port) << 16 ^ u32::from(flow.client_port) ^ packet.seq;
    (seed.wrapping_mul(0x9e37_79b1) >> 8) % 100
}

/// Whether the route to the client leaves by the interface that its packet came in by.
#[inline(always)]
fn leaves_by(
    skb: *mut __sk_buff,
    packet: &Packet,
    config: &Config,
    interface: &Interface,
    index: u32,
) -> bool {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const SKIP_NEIGHBOUR: u32 = 4;
    const SUCCESS: i64 = 0;
    let symmetric = if packet.v4 { interface.symmetric_v4 } else { interface.symmetric_v6 };
    if symmetric != 0 {
        return true;
    }
    let sure = if packet.v4 { config_flags::ROUTES_V4 } else { config_flags::ROUTES_V6 };
    if config.flags & sure != 0 {
        return maps::route(&packet.flow.client) == index;
    }
    let flow = &packet.flow;
    // SAFETY: a plain structure of integers and arrays of them.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.l4_protocol = 6;
    query.sport = flow.server_port;
    query.dport = flow.client_port;
    // As the kernel asks for packets of its own: from loopback. It says no where that does not forward.
    query.ifindex = LOOPBACK;
    if packet.v4 {
        query.family = AF_INET;
        query.__bindgen_anon_3.ipv4_src = flow.server[3];
        query.__bindgen_anon_4.ipv4_dst = flow.client[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_3.ipv6_src = flow.server;
        query.__bindgen_anon_4.ipv6_dst = flow.client;
    }
    let size = const { size_of::<bpf_fib_lookup>() as u8 };
    // SAFETY: the structure, and its size.
    let found = unsafe { fib_lookup(skb.cast(), &raw mut query, i32::from(size), SKIP_NEIGHBOUR) };
    found == SUCCESS && query.ifindex == index
}

/// Has the kernel end a TIME_WAIT, which it does for a SYN like this one before it looks for a listener: it gets a copy
/// that also has FIN, and a listener drops a SYN with FIN without a word (`tcp_rcv_state_process`, case TCP_LISTEN).
#[inline(always)]
fn end_time_wait(skb: *mut __sk_buff, packet: &Packet) -> bool {
    // SAFETY: the context.
    let index = unsafe { (*skb).ifindex };
    let mut before = [0_u8; 2];
    if !packet::load(skb, packet.tcp + 12, &mut before) {
        return false;
    }
    let with_fin = [before[0], before[1] | flags::FIN];
    if !replace(skb, packet, before, with_fin) {
        return false;
    }
    // SAFETY: a clone of the packet, to the ingress of its own interface: it comes here again, and passes.
    let sent = unsafe { bpf_clone_redirect(skb, index, u64::from(BPF_F_INGRESS)) } == 0;
    replace(skb, packet, with_fin, before) && sent
}

/// Replaces data offset and flags, and what the checksum says of them.
#[inline(always)]
fn replace(skb: *mut __sk_buff, packet: &Packet, from: [u8; 2], to: [u8; 2]) -> bool {
    let (old, new) = (u64::from(u16::from_ne_bytes(from)), u64::from(u16::from_ne_bytes(to)));
    // SAFETY: helpers that check their bounds.
    unsafe {
        bpf_skb_store_bytes(skb, packet.tcp + 12, to.as_ptr().cast(), 2, 0) == 0
            && bpf_l4_csum_replace(skb, packet.tcp + 16, old, new, 2) == 0
    }
}

/// Answers a TCP keepalive (RFC 9293 §3.8.4) of a client that has not sent data yet.
#[inline(always)]
pub(crate) fn keepalive(skb: *mut __sk_buff, packet: &Packet, pending: &Pending, window: u32) -> i32 {
    if !packet.plain {
        return SHOT;
    }
    let Some(probe) = packet.options(skb) else { return SHOT };
    let reply = Reply {
        seq: pending.server_isn.wrapping_add(1),
        ack: pending.client_isn.wrapping_add(1),
        flags: flags::ACK,
        window: (window >> (pending.server_scale & 15)) as u16,
        options: pending.options & probe.present & options::TIMESTAMPS,
        // Our clock stands until the kernel takes over, which goes on from what the client last echoed.
        ts_value: probe.ts_echo,
        ts_echo: probe.ts_value,
        ..Reply::default()
    };
    match send(skb, packet, &reply) {
        sent::UNTOUCHED | sent::BROKEN => SHOT,
        verdict => {
            maps::count(event::Keepalive);
            verdict
        }
    }
}
