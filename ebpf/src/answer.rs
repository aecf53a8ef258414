//! The program's own answers: may it answer, and by what.

use aya_ebpf::bindings::__sk_buff;
use preflightd_common::{
    abi::{Config, DATE, MAX_DATES, MAX_TEXT, Template, ask, config_flags, options},
    decide::{self, verdict, wants},
    head::{self, seal},
    tcp::{flags, fold, sum_at},
    words::{LOOKED_AT, inside, word},
};

use crate::{
    maps::{self, Scratch},
    packet::{self, Packet},
};

/// An answer that is about to be sent.
#[derive(Clone, Copy)]
pub(crate) struct Body {
    /// Bytes of it.
    pub(crate) length: u32,
    /// Their folded sum.
    pub(crate) sum: u32,
    pub(crate) template: Template,
    /// Of its date.
    pub(crate) second: u32,
    /// Where the origin lies in the head.
    pub(crate) origin: u32,
    /// 0: the answer has none.
    pub(crate) origin_length: u32,
}

unsafe extern "C" fn head_step(_: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: `repeat` hands over what it was given.
    let Scratch { reading, head, .. } = unsafe { &mut **scratch };
    i64::from(!reading.step(head))
}

unsafe extern "C" fn decide_step(_: u32, scratch: *mut *mut Scratch) -> i64 {
    // SAFETY: as above.
    let Scratch { deciding, reading, head, .. } = unsafe { &mut **scratch };
    match deciding.prepare(head, reading) {
        wants::NOTHING => 1,
        wants::LOOK_UP => {
            let found = maps::term(&deciding.key);
            deciding.take(head, reading, found);
            i64::from(deciding.verdict != verdict::OPEN)
        }
        _ => 0,
    }
}

/// Reads the head of `length` bytes that lies in the scratch; false: it is not for the program, and why is counted.
#[inline(always)]
pub(crate) fn read_head(scratch: &mut Scratch, length: u32) -> bool {
    seal(&mut scratch.head, length);
    scratch.reading.begin(length);
    maps::repeat(head::MAX_STEPS, head_step, scratch);
    let good = scratch.reading.is_preflight();
    if !good {
        maps::count_asked(scratch.reading.why);
    }
    good
}

/// Decides the request of a segment that begins like a preflight: of [`verdict`]. With an answer all that is needed for it
/// lies in the scratch.
///
/// Called, not copied in: twice is too much for the verifier.
#[inline(never)]
pub(crate) fn judge(skb: *mut __sk_buff, packet: &Packet, config: &Config, now: u64) -> u32 {
    if config.flags & config_flags::ANSWERS == 0 || config.generation == 0 {
        maps::count_asked(ask::Off);
        return verdict::ASK;
    }
    let (Some(scratch), Some(service)) = (maps::scratch(), maps::service(&packet.flow)) else {
        return verdict::ASK;
    };
    if !maps::may_answer(config, service, now) {
        return verdict::ASK;
    }
    let odd = packet.flags & (flags::FIN | flags::URG) != 0 || !packet.plain;
    // SAFETY: the context.
    let merged = unsafe { (*skb).gso_size } != 0;
    if odd || merged || packet.data > LOOKED_AT as u32 || packet.data > config.max_head {
        maps::count_asked(ask::Segment);
        return verdict::ASK;
    }
    let bounded = packet.data & 2047;
    if bounded == 0 || !packet::load_part(skb, packet.data_at(), &mut scratch.head, bounded) {
        return verdict::ASK;
    }
    if !read_head(scratch, bounded) {
        return verdict::ASK;
    }
    let Scratch { deciding, reading, .. } = scratch;
    deciding.begin(config.generation, service.listener, reading);
    maps::repeat(decide::MAX_STEPS, decide_step, scratch);
    if scratch.deciding.verdict == verdict::ANSWER || scratch.deciding.verdict == verdict::PROXY {
        return scratch.deciding.verdict;
    }
    maps::count_asked(scratch.deciding.why);
    verdict::ASK
}

/// Measures the answer of this template and second to the head in the scratch; false: there is no such template or date
/// any more.
///
/// Called, not copied in: what it needs of the stack others need too.
#[inline(never)]
pub(crate) fn measure(template: Template, second: u32) -> bool {
    let (Some(scratch), Some(pieces), Some(date)) =
        (maps::scratch(), maps::template(&template), maps::date(second))
    else {
        return false;
    };
    // One that is about to be replaced counts for gone.
    let age = maps::config().map_or(0, |config| config.second.wrapping_sub(second));
    if date.second != second || age > MAX_DATES - 4 {
        return false;
    }
    let mut length = pieces.front_length;
    let mut sum = u64::from(pieces.front_sum) + sum_at(date.sum, length);
    length += DATE;
    sum += sum_at(pieces.middle_sum, length);
    length += pieces.middle_length;
    let (origin, mut origin_length) = (scratch.reading.origin, 0);
    if pieces.origin != 0 {
        origin_length = origin.end.wrapping_sub(origin.at);
        if origin_length == 0 || origin_length > MAX_TEXT {
            return false;
        }
        let mut origin_sum = 0;
        let mut before = 0;
        while before < MAX_TEXT {
            let text = word(&scratch.head, origin.at + before) & inside(origin_length, before);
            // As it lies in memory.
            let text = text.to_le();
            origin_sum += (text & 0xffff_ffff) + (text >> 32);
            before += 8;
        }
        sum += sum_at(fold(origin_sum), length);
        length += origin_length;
    }
    sum += sum_at(pieces.tail_sum, length);
    length += pieces.tail_length;
    scratch.body = Body { length, sum: fold(sum), template, second, origin: origin.at, origin_length };
    true
}

/// Whether the client takes so much at once. `mss`, `scale`, `agreed`: of its handshake.
#[inline(always)]
pub(crate) fn fits(packet: &Packet, length: u32, mss: u16, scale: u8, agreed: u8) -> bool {
    // The MSS is without options (RFC 6691).
    let with_options = if agreed & options::TIMESTAMPS == 0 { length } else { length + 12 };
    with_options <= u32::from(mss) && length <= u32::from(packet.window) << (scale & 15)
}
