//! Connections that the program answers on: no socket has them, and each may become a worker's or the proxy's with the
//! next segment, as if it had begun there.
//!
//! Nothing is ever sent again by itself: a client that has lost an answer sends its request again, and gets the very same
//! bytes. Until it has acknowledged an answer nothing of what it sent is acknowledged otherwise than by that answer, and
//! nothing else of it is taken.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use preflightd_common::{
    abi::{Answered, Config, Pending, TICK_SHIFT, Template, ask, event, kind, options, stage},
    decide::verdict,
    preflight,
    tcp::{after, flags},
};

use crate::{
    NEXT, answer,
    maps::{self, Scratch},
    packet::{self, Packet},
    reply::{send_answer, send_prepared, sent},
    verdict as whose,
};

const SHOT: i32 = TC_ACT_SHOT;

/// A segment of a connection that the program has answered on.
#[inline(never)]
pub(crate) fn segment(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let stage = answered.pending.stage;
    if stage == stage::GIVEN || stage == stage::GIVEN_TO_WORKER {
        return whose::given(skb, packet, &mut answered.pending, true);
    }
    let offset = whose::offset(packet, &answered.pending);
    if packet.flags & flags::SYN != 0 {
        return NEXT;
    }
    if packet.flags & flags::RST != 0 {
        // Where we have said that we stand, too: a client that knows nothing of the connection resets just there, and what
        // is answered by an acknowledgement again goes on for ever.
        let told = answered.acknowledged == 0 && offset.wrapping_add(answered.request) == 0;
        if offset != 0 && !told {
            // Anybody can send a reset; who means it says it again (RFC 5961 §3.2).
            return acknowledge(skb, packet, answered);
        }
        maps::count(event::ClientReset);
        maps::forget_answered(&packet.flow);
        return SHOT;
    }
    let Some(config) = maps::config() else { return NEXT };
    if packet.flags & flags::ACK == 0 {
        return SHOT;
    }
    let next = answered.pending.server_isn.wrapping_add(1);
    let unknown = next.wrapping_sub(packet.ack);
    if unknown == 0 {
        answered.acknowledged = 1;
    } else if answered.acknowledged == 0 && unknown < answered.answer && offset == 0 {
        if stage == stage::ENDING && unknown == 1 {
            // All but our FIN.
            return end(skb, packet, answered);
        }
        // A part of an answer, which somebody on the way has cut. The rest it never asks for: its request is acknowledged.
        return gone(skb, packet, answered);
    } else if packet.ack != next.wrapping_sub(answered.answer) || answered.acknowledged != 0 {
        // Of what was never sent, or long since acknowledged.
        maps::count(event::BadNumbers);
        return acknowledge(skb, packet, answered);
    }
    let now = maps::now();
    if offset != u32::MAX {
        // Not by TCP keepalives: whoever has nothing to say makes room in time.
        answered.pending.touched = (now >> TICK_SHIFT) as u32;
    }
    if stage == stage::ENDED {
        if packet.ack == next {
            maps::forget_answered(&packet.flow);
            return SHOT;
        }
        // Its FIN again: ours was lost.
        return if packet.flags & flags::FIN != 0 { end(skb, packet, answered) } else { SHOT };
    }
    let speaks = packet.data != 0 || packet.flags & flags::FIN != 0;
    if offset == 0 {
        if !speaks {
            return SHOT;
        }
        if packet.ack != next {
            // It does not know the answer yet; what it says now it will say again.
            maps::count(event::OutOfOrder);
            return SHOT;
        }
        if stage == stage::ENDING {
            return last(skb, packet, answered);
        }
        if packet.data == 0 {
            return end(skb, packet, answered);
        }
        return next_request(skb, packet, answered, config, now);
    }
    if offset == u32::MAX && packet.data <= 1 {
        // A TCP keepalive.
        maps::count(event::Keepalive);
        return acknowledge(skb, packet, answered);
    }
    if offset.wrapping_add(answered.request) == 0 && packet.data != 0 && packet.ack != next {
        return again(skb, packet, answered);
    }
    if !after(packet.seq, answered.pending.client_isn) {
        // Old: it has missed an acknowledgement.
        return acknowledge(skb, packet, answered);
    }
    maps::count(event::OutOfOrder);
    SHOT
}

/// Begins a reply on the connection, in the scratch, as far as it is the same for all.
#[inline(always)]
fn reply(packet: &Packet, pending: &Pending, scratch: &mut Scratch, ts: (u8, u32, u32)) {
    let window = maps::config().map_or(0, |config| config.window);
    let ecn = pending.options & options::ECN != 0 && packet.ecn == 3;
    let reply = &mut scratch.reply;
    reply.seq = pending.server_isn.wrapping_add(1);
    reply.ack = pending.client_isn.wrapping_add(1);
    reply.flags = if ecn { flags::ACK | flags::ECE } else { flags::ACK };
    reply.window = (window >> (pending.server_scale & 15)) as u16;
    reply.mss = 0;
    reply.scale = 0;
    reply.options = pending.options & ts.0 & options::TIMESTAMPS;
    // Our clock stands, as in `handshake::keepalive`.
    reply.ts_value = ts.2;
    reply.ts_echo = ts.1;
}

/// Sends the reply in the scratch, without data.
#[inline(always)]
fn send(skb: *mut __sk_buff, packet: &Packet, scratch: &mut Scratch) -> i32 {
    if !packet.plain {
        return SHOT;
    }
    match send_prepared(skb, packet, scratch) {
        sent::UNTOUCHED | sent::BROKEN => SHOT,
        verdict => verdict,
    }
}

/// The segment's timestamps: whether there are some, value, echo.
#[inline(always)]
fn stamps(skb: *mut __sk_buff, packet: &Packet) -> (u8, u32, u32) {
    match packet.options(skb) {
        Some(found) => (found.present, found.ts_value, found.ts_echo),
        None => (0, 0, 0),
    }
}

/// Says where the connection stands. Before the client has acknowledged the last answer, as if there had been neither that
/// nor its request, or the client would not ask for it again.
#[inline(never)]
fn acknowledge(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let ts = stamps(skb, packet);
    let Some(scratch) = maps::scratch() else { return SHOT };
    reply(packet, &answered.pending, scratch, ts);
    if packet.flags & (flags::RST | flags::SYN) != 0 {
        scratch.reply.options = 0;
    }
    if answered.acknowledged == 0 {
        scratch.reply.seq = scratch.reply.seq.wrapping_sub(answered.answer);
        scratch.reply.ack = scratch.reply.ack.wrapping_sub(answered.request);
    }
    send(skb, packet, scratch)
}

/// The client ends: our FIN. Or that again, if it was lost.
#[inline(never)]
fn end(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let ts = stamps(skb, packet);
    let Some(scratch) = maps::scratch() else { return SHOT };
    let pending = &mut answered.pending;
    reply(packet, pending, scratch, ts);
    scratch.reply.flags |= flags::FIN;
    if pending.stage == stage::OPEN {
        scratch.reply.ack = scratch.reply.ack.wrapping_add(1);
        pending.client_isn = pending.client_isn.wrapping_add(1);
        pending.server_isn = pending.server_isn.wrapping_add(1);
        pending.stage = stage::ENDED;
        answered.request = 1;
        answered.answer = 1;
        answered.acknowledged = 0;
    } else {
        scratch.reply.seq = scratch.reply.seq.wrapping_sub(1);
    }
    maps::count(event::KernelEnd);
    send(skb, packet, scratch)
}

/// Our FIN is out and acknowledged: the client's own is the end of it, and it has nothing more to say.
#[inline(never)]
fn last(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let ts = stamps(skb, packet);
    let Some(scratch) = maps::scratch() else { return SHOT };
    reply(packet, &answered.pending, scratch, ts);
    if packet.data == 0 {
        scratch.reply.ack = scratch.reply.ack.wrapping_add(1);
    } else {
        reset(scratch);
    }
    maps::forget_answered(&packet.flow);
    maps::count(event::KernelEnd);
    send(skb, packet, scratch)
}

/// Makes a reset of the reply.
#[inline(always)]
fn reset(scratch: &mut Scratch) {
    scratch.reply.flags = flags::RST;
    scratch.reply.options = 0;
    scratch.reply.ack = 0;
}

/// The next request: answered, or the connection's hand-over.
#[inline(always)]
fn next_request(
    skb: *mut __sk_buff,
    packet: &Packet,
    answered: &mut Answered,
    config: &Config,
    now: u64,
) -> i32 {
    let (mut first, mut passed) = (0_u64, false);
    if packet.data > 8
        && packet::load(skb, packet.data_at(), &mut first)
        && first == u64::from_ne_bytes(*preflight::METHOD)
    {
        let judged = answer::judge(skb, packet, config, now);
        if judged == verdict::ANSWER {
            let verdict = go_on(skb, packet, answered);
            if verdict != sent::UNTOUCHED {
                return verdict;
            }
        } else if judged == verdict::PROXY {
            passed = true;
        } else if maps::may_wait(config, &packet.flow, now) && whose::may_be_answered(skb, packet) {
            let taken = whose::give_to_worker(skb, packet, &mut answered.pending, now);
            if taken != whose::NOBODY {
                maps::count(event::HandedOver);
                return taken;
            }
        }
    }
    let verdict = whose::give_to_proxy(skb, packet, &mut answered.pending);
    if answered.pending.stage == stage::GIVEN {
        maps::count(event::HandedOver);
        if passed {
            maps::count_outcome();
        }
    } else if verdict == NEXT {
        // Nobody listens any more, and the kernel says so.
        maps::forget_answered(&packet.flow);
    }
    verdict
}

/// Answers a further request; [`sent::UNTOUCHED`]: it is not the program's after all.
#[inline(always)]
fn go_on(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    if !prepare(skb, packet, &answered.pending) {
        return sent::UNTOUCHED;
    }
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    match send_answer(skb, packet) {
        sent::UNTOUCHED => sent::UNTOUCHED,
        sent::BROKEN => SHOT,
        verdict => {
            *answered = scratch.next;
            count_answer();
            verdict
        }
    }
}

/// Answers the first request of a deferred connection, which becomes one of these; [`sent::UNTOUCHED`]: it is not the
/// program's after all.
#[inline(never)]
pub(crate) fn begin(skb: *mut __sk_buff, packet: &Packet, pending: &Pending) -> i32 {
    if !prepare(skb, packet, pending) {
        return sent::UNTOUCHED;
    }
    let Some(scratch) = maps::scratch() else { return sent::UNTOUCHED };
    if !maps::remember_answered(&packet.flow, &scratch.next) {
        maps::count_asked(ask::Connections);
        return sent::UNTOUCHED;
    }
    let verdict = send_answer(skb, packet);
    if verdict == sent::UNTOUCHED || verdict == sent::BROKEN {
        maps::forget_answered(&packet.flow);
        // Of a spoilt packet nothing is left to give to anybody: the client sends it again.
        return if verdict == sent::BROKEN { SHOT } else { sent::UNTOUCHED };
    }
    maps::count_port(u32::from(pending.row), kind::Kernel);
    // Now, since at any time one of the two must be there.
    maps::forget(&packet.flow);
    count_answer();
    verdict
}

#[inline(always)]
fn count_answer() {
    maps::count(event::KernelAnswer);
    maps::count_outcome();
}

/// Prepares the answer that was decided upon: its measures, its header, and the connection behind it, all in the scratch.
/// False: it does not fit.
///
/// Called, not copied in: what it needs of the stack the sending needs too.
#[inline(never)]
fn prepare(skb: *mut __sk_buff, packet: &Packet, pending: &Pending) -> bool {
    let (Some(scratch), Some(config)) = (maps::scratch(), maps::config()) else { return false };
    let template =
        Template { generation: scratch.deciding.key.generation, number: scratch.deciding.template };
    let measured = answer::measure(template, config.second);
    let length = scratch.body.length;
    if !measured || !answer::fits(packet, length, pending.mss, pending.client_scale, pending.options) {
        maps::count_asked(ask::Room);
        return false;
    }
    let ts = stamps(skb, packet);
    reply(packet, pending, scratch, ts);
    let Scratch { body, next, reply, .. } = scratch;
    // The second of two templates closes.
    let close = body.template.number & 1;
    reply.ack = reply.ack.wrapping_add(packet.data);
    reply.flags |= flags::PSH;
    if close != 0 {
        reply.flags |= flags::FIN;
    }
    next.request = packet.data;
    next.answer = body.length + close;
    next.template = body.template;
    next.second = body.second;
    next.sum = body.sum;
    next.acknowledged = 0;
    next.pending = *pending;
    next.pending.client_isn = pending.client_isn.wrapping_add(next.request);
    next.pending.server_isn = pending.server_isn.wrapping_add(next.answer);
    next.pending.stage = if close == 0 { stage::OPEN } else { stage::ENDING };
    true
}

/// A request that was sent again, since its answer was lost: the very same bytes, or none.
#[inline(never)]
fn again(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let Some(scratch) = maps::scratch() else { return SHOT };
    let bounded = answered.request & 2047;
    if !packet.plain || bounded == 0 {
        return SHOT;
    }
    let close = answered.template.number & 1;
    // It may have more behind it, of the next one, but not less.
    let same = packet.data >= bounded
        && packet::load_part(skb, packet.data_at(), &mut scratch.head, bounded)
        && answer::read_head(scratch, bounded)
        && answer::measure(answered.template, answered.second)
        && scratch.body.length + close == answered.answer
        && scratch.body.sum == answered.sum;
    if !same {
        return gone(skb, packet, answered);
    }
    let ts = stamps(skb, packet);
    reply(packet, &answered.pending, scratch, ts);
    scratch.reply.seq = scratch.reply.seq.wrapping_sub(answered.answer);
    scratch.reply.flags |= flags::PSH;
    if close != 0 {
        scratch.reply.flags |= flags::FIN;
    }
    match send_answer(skb, packet) {
        sent::UNTOUCHED | sent::BROKEN => SHOT,
        verdict => {
            maps::count(event::KernelAnswer);
            maps::count(event::KernelAnswerAgain);
            verdict
        }
    }
}

/// Something that was sent is gone: the client learns it, and may begin anew.
#[inline(never)]
fn gone(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    let ts = stamps(skb, packet);
    let Some(scratch) = maps::scratch() else { return SHOT };
    reply(packet, &answered.pending, scratch, ts);
    scratch.reply.seq = packet.ack;
    reset(scratch);
    maps::count(event::KernelAnswerGone);
    maps::forget_answered(&packet.flow);
    send(skb, packet, scratch)
}

/// A SYN for such a connection. True: it makes way for a new one.
#[inline(always)]
pub(crate) fn gives_way(packet: &Packet, answered: &Answered) -> bool {
    match answered.pending.stage {
        stage::GIVEN | stage::GIVEN_TO_WORKER => true,
        // As a TIME_WAIT does (RFC 6191).
        stage::ENDING => answered.acknowledged != 0 && after(packet.seq, answered.pending.client_isn),
        stage::ENDED => after(packet.seq, answered.pending.client_isn),
        _ => false,
    }
}

/// Answers a SYN for a connection that goes on by an acknowledgement, as `handshake::challenge`.
#[inline(always)]
pub(crate) fn challenge(skb: *mut __sk_buff, packet: &Packet, answered: &mut Answered) -> i32 {
    maps::count(event::Challenge);
    acknowledge(skb, packet, answered)
}
