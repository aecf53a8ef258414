//! The initial sequence number of a deferred connection: a cookie that proves, without memory, that the client has seen
//! our SYN-ACK.
//!
//! ```text
//! bits 31..8           7       6..5    4       3..0
//! keyed hash (24)      slot    MSS     SACK    window scale (15: none)
//! ```
//!
//! The hash is SipHash-2-4 (Aumasson and Bernstein, 2012) over addresses, ports, the client's initial sequence number
//! and the time slot. A cookie is good for its slot and the next one. It is looked at only for a connection whose entry
//! was evicted from `PENDING`; the entry itself holds everything exactly.

use crate::abi::{Flow, options};

/// A secret of 128 bits.
pub type Key = [u64; 2];

/// A time slot is 2^this nanoseconds: 69 s.
pub const SLOT_SHIFT: u32 = 36;

/// The client's MSS is rounded down to one of these. The least that the kernel takes is 536 (IPv4) and 1220 (IPv6).
pub const MSS: [u16; 4] = [536, 1220, 1400, 1440];

/// What a cookie remembers of the client's SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// One of [`MSS`].
    pub mss: u16,
    /// Its window scale, 0 without [`options::WINDOW_SCALE`].
    pub scale: u8,
    /// [`options::SACK`] and [`options::WINDOW_SCALE`].
    pub options: u8,
}

/// The cookie for a SYN in the slot of `now` (nanoseconds), and a number to begin our timestamps at. `scale`: the
/// client's window scale, at most 14.
#[inline(always)]
pub fn make(key: Key, flow: &Flow, client_isn: u32, now: u64, mss: u16, scale: u8, agreed: u8) -> (u32, u32) {
    let slot = now >> SLOT_SHIFT;
    let mut index = 0;
    if mss >= MSS[1] {
        index = 1;
    }
    if mss >= MSS[2] {
        index = 2;
    }
    if mss >= MSS[3] {
        index = 3;
    }
    let sack = u32::from(agreed & options::SACK != 0);
    let scale = if agreed & options::WINDOW_SCALE == 0 { 15 } else { u32::from(scale) & 15 };
    let hash = hash(key, flow, client_isn, slot);
    let cookie = (hash >> 40) as u32;
    (cookie << 8 | (slot as u32 & 1) << 7 | index << 5 | sack << 4 | scale, hash as u32)
}

/// Whether `cookie` was made by `key` in the slot of `now` or the one before, and what it remembers.
#[inline(always)]
pub fn check(key: Key, flow: &Flow, client_isn: u32, now: u64, cookie: u32) -> Option<Remembered> {
    let current = now >> SLOT_SHIFT;
    // The slot's lowest bit tells which of the two it was.
    let slot = current.wrapping_sub((current & 1) ^ u64::from(cookie >> 7 & 1));
    if (hash(key, flow, client_isn, slot) >> 40) as u32 != cookie >> 8 {
        return None;
    }
    let mss = match cookie >> 5 & 3 {
        0 => MSS[0],
        1 => MSS[1],
        2 => MSS[2],
        _ => MSS[3],
    };
    let scale = (cookie & 15) as u8;
    let sack = if cookie & 16 == 0 { 0 } else { options::SACK };
    Some(if scale == 15 {
        Remembered { mss, scale: 0, options: sack }
    } else {
        Remembered { mss, scale, options: sack | options::WINDOW_SCALE }
    })
}

/// The upper 24 bits are the cookie's.
#[inline(always)]
fn hash(key: Key, flow: &Flow, client_isn: u32, slot: u64) -> u64 {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let (c, s) = (&flow.client, &flow.server);
    let ports = u32::from(flow.client_port) | u32::from(flow.server_port) << 16;
    let words = [
        pair(c[0], c[1]),
        pair(c[2], c[3]),
        pair(s[0], s[1]),
        pair(s[2], s[3]),
        pair(ports, client_isn),
        slot,
    ];
    siphash(key, &words)
}

/// SipHash-2-4 of whole words.
#[inline(always)]
pub fn siphash<const N: usize>(key: Key, words: &[u64; N]) -> u64 {
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut i = 0;
    while i < N {
        absorb(&mut v, words[i]);
        i += 1;
    }
    absorb(&mut v, (N as u64 * 8) << 56);
    v[2] ^= 0xff;
    round(&mut v);
    round(&mut v);
    round(&mut v);
    round(&mut v);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn absorb(v: &mut [u64; 4], word: u64) {
    v[3] ^= word;
    round(v);
    round(v);
    v[0] ^= word;
}

#[inline(always)]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[2] = v[2].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[1]);
    v[0] = v[0].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
    const SLOT: u64 = 1 << SLOT_SHIFT;
    const NOW: u64 = 5 * SLOT + 17;

    fn flow() -> Flow {
        Flow {
            client: [0, 0, 0xffff_0000, 0x0200_4d0a],
            server: [0, 0, 0xffff_0000, 0x0100_4d0a],
            client_port: 0x1234,
            server_port: 0x5000,
        }
    }

    /// The reference vectors of the paper's implementation (`vectors_sip64`), for messages of 0, 8, … 56 bytes.
    #[test]
    fn siphash_is_siphash() {
        let word = |i: u64| u64::from_le_bytes(std::array::from_fn(|b| (i * 8) as u8 + b as u8));
        assert_eq!(siphash(KEY, &[]), 0x726f_db47_dd0e_0e31);
        assert_eq!(siphash(KEY, &[word(0)]), 0x93f5_f579_9a93_2462);
        assert_eq!(siphash(KEY, &[word(0), word(1)]), 0x3f2a_cc7f_57c2_9bdb);
    }

    #[test]
    fn a_cookie_is_good_in_its_slot_and_the_next() {
        let all = options::SACK | options::WINDOW_SCALE;
        let (cookie, _) = make(KEY, &flow(), 7, NOW, 1460, 9, all);
        let want = Some(Remembered { mss: 1440, scale: 9, options: all });
        for (later, want) in [(0, want), (SLOT - 18, want), (SLOT, want), (2 * SLOT, None), (3 * SLOT, None)]
        {
            assert_eq!(check(KEY, &flow(), 7, NOW + later, cookie), want, "{later}");
        }
    }

    #[test]
    fn a_cookie_remembers_the_options() {
        for (mss, known) in
            [(536, 536), (1219, 536), (1220, 1220), (1400, 1400), (1439, 1400), (65_495, 1440)]
        {
            for scale in 0..=14 {
                for agreed in [0, options::SACK, options::WINDOW_SCALE, options::SACK | options::WINDOW_SCALE]
                {
                    let (cookie, _) = make(KEY, &flow(), 1, NOW, mss, scale, agreed | options::TIMESTAMPS);
                    let scale = if agreed & options::WINDOW_SCALE == 0 { 0 } else { scale };
                    let want = Remembered { mss: known, scale, options: agreed };
                    assert_eq!(check(KEY, &flow(), 1, NOW, cookie), Some(want));
                }
            }
        }
    }

    #[test]
    fn a_cookie_is_of_one_connection_and_one_key() {
        let (cookie, _) = make(KEY, &flow(), 7, NOW, 1460, 7, options::SACK);
        assert!(check(KEY, &flow(), 7, NOW, cookie).is_some());
        assert_eq!(check([1, 2], &flow(), 7, NOW, cookie), None);
        assert_eq!(check(KEY, &flow(), 8, NOW, cookie), None);
        assert_eq!(check(KEY, &flow(), 7, NOW, cookie ^ 1 << 8), None);
        for other in [
            Flow { client: [0, 0, 0xffff_0000, 1], ..flow() },
            Flow { server: [0, 0, 0xffff_0000, 1], ..flow() },
            Flow { client_port: 1, ..flow() },
            Flow { server_port: 1, ..flow() },
        ] {
            assert_eq!(check(KEY, &other, 7, NOW, cookie), None);
        }
    }
}
