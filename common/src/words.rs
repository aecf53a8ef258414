//! Bytes eight at a time: loads from the buffer that a segment is read into, and questions to all eight bytes of a word
//! at once. A mask has the high bit of each byte for which the answer is yes, and nothing else.

/// So many bytes of a segment are looked at.
pub const LOOKED_AT: usize = 1536;

/// A buffer for them. What lies behind may be looked at, but counts for nothing: from any masked offset on there are as many
/// bytes as the longest text ([`crate::abi::MAX_TEXT`]).
pub type Buffer = [u8; 2048 + 64];
const OFFSETS: u32 = 2047;

/// One in each byte.
pub const ONES: u64 = 0x0101_0101_0101_0101;
/// The high bit of each byte.
pub const HIGH: u64 = ONES << 7;
/// Makes letters lower-case, and leaves digits and `-` as they are.
pub const LOWER: u64 = ONES * 0x20;

/// A number of which the compiler knows nothing, so that it does not leave out a bound that the verifier wants to see.
#[inline(always)]
pub fn opaque(number: u32) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut seen = u64::from(number);
        #[expect(unsafe_code, reason = "an instruction that does nothing")]
        // SAFETY: adds nothing. An instruction there must be, or two lines of the source would be at the same one.
        unsafe {
            core::arch::asm!("{0} += 0", inout(reg) seen, options(pure, nomem, nostack));
        }
        seen as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

/// The byte at an offset below 2,048.
#[inline(always)]
pub fn byte(bytes: &Buffer, at: u32) -> u8 {
    bytes[(at & OFFSETS) as usize]
}

/// The eight bytes from an offset below 2,048 on, the first one lowest.
#[inline(always)]
pub fn word(bytes: &Buffer, at: u32) -> u64 {
    load(bytes, at & OFFSETS)
}

/// The same of any bytes, from an offset that the caller has bounded by their end.
#[inline(always)]
pub fn load<const N: usize>(bytes: &[u8; N], at: u32) -> u64 {
    let at = at as usize;
    // By the compiler's own doing this would be eight loads, for it knows nothing of alignment on this target.
    #[cfg(target_arch = "bpf")]
    {
        let value: u64;
        #[expect(
            unsafe_code,
            reason = "a load of eight bytes wherever they lie, which kernels allow where it is cheap"
        )]
        // SAFETY: within the bytes, as the verifier checks too.
        unsafe {
            core::arch::asm!(
                "{value} = *(u64 *)({from} + 0)",
                value = out(reg) value,
                from = in(reg) bytes.as_ptr().add(at),
                options(pure, readonly, nostack),
            );
        }
        u64::from_le(value)
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
    }
}

/// Writes eight bytes, the first one lowest, from an offset on that the caller has bounded by the end.
#[inline(always)]
pub fn store<const N: usize>(bytes: &mut [u8; N], at: u32, word: u64) {
    let at = at as usize;
    #[cfg(target_arch = "bpf")]
    {
        #[expect(unsafe_code, reason = "as in `load`")]
        // SAFETY: within the bytes, as the verifier checks too.
        unsafe {
            core::arch::asm!(
                "*(u64 *)({to} + 0) = {word}",
                to = in(reg) bytes.as_mut_ptr().add(at),
                word = in(reg) word.to_le(),
                options(nostack),
            );
        }
    }
    #[cfg(not(target_arch = "bpf"))]
    if let Some(chunk) = bytes[at..].first_chunk_mut() {
        *chunk = word.to_le_bytes();
    }
}

/// Text of eight bytes as [`word`] loads it; zeros in front for shorter text, which is compared with a word shifted left.
#[inline(always)]
pub const fn front(text: &[u8; 8]) -> u64 {
    u64::from_le_bytes(*text)
}

/// Bytes that equal `byte`.
#[inline(always)]
pub fn equal(word: u64, byte: u8) -> u64 {
    let difference = word ^ (ONES * u64::from(byte));
    !(((difference & !HIGH) + !HIGH) | difference) & HIGH
}

/// ASCII bytes from `low` (at least 1) to `high`.
#[inline(always)]
pub fn within(word: u64, low: u8, high: u8) -> u64 {
    let bytes = word & !HIGH;
    (bytes + ONES * (0x80 - u64::from(low))) & !(bytes + ONES * (0x7f - u64::from(high))) & !word & HIGH
}

/// Bytes that are not printable ASCII or a blank: controls, DEL, and whatever is no ASCII.
#[inline(always)]
pub fn strange(word: u64) -> u64 {
    let bytes = word & !HIGH;
    (!(bytes + ONES * 0x60) | word | (bytes + ONES)) & HIGH
}

/// Where a header's name ends: the first byte that is no letter of either case, no digit and no `-`, and whether that is a colon; 0, if
/// none is in the word. All bytes up to there must be ASCII, which makes this so short; what lies behind does not matter.
#[inline(always)]
pub fn name_end(word: u64) -> (u64, bool) {
    let lower = word | LOWER;
    let letters = lower.wrapping_add(ONES * (0x80 - 0x61)) & !lower.wrapping_add(ONES * (0x7f - 0x7a));
    let digits = lower.wrapping_add(ONES * (0x80 - 0x30)) & !lower.wrapping_add(ONES * (0x7f - 0x39));
    let dashes = !(lower ^ (ONES * 0x2d)).wrapping_add(!HIGH);
    let others = !(letters | digits | dashes) & HIGH;
    let end = others & others.wrapping_neg();
    let colons = !(lower ^ (ONES * 0x3a)).wrapping_add(!HIGH);
    (end, colons & end != 0)
}

/// Lower-case letters, digits, `-`, `_` and `.`: what host names consist of.
#[inline(always)]
pub fn host_bytes(word: u64) -> u64 {
    within(word, b'a', b'z') | within(word, b'0', b'9') | within(word, b'-', b'.') | equal(word, b'_')
}

/// Letters, digits and what else every proxy reads alike in a path: `&'()*+,-./:@_`.
#[inline(always)]
pub fn path_bytes(word: u64) -> u64 {
    within(word, b'&', b':') | within(word, b'@', b'Z') | within(word, b'a', b'z') | equal(word, b'_')
}

/// Mask of the first `count` bytes; of all from eight on.
#[inline(always)]
pub fn first(count: u32) -> u64 {
    if count >= 8 { HIGH } else { ((1_u64 << (8 * count)) - 1) & HIGH }
}

/// Number of the byte of the lowest bit of a mask that is not empty.
#[inline(always)]
pub fn lowest(mask: u64) -> u32 {
    let below = (mask & mask.wrapping_neg()).wrapping_sub(1);
    // Each byte below is 0xff, the last 0x7f: count their lowest bits.
    ((below & ONES).wrapping_mul(ONES) >> 56) as u32 - 1
}

/// How many bytes a mask has.
#[inline(always)]
pub fn count(mask: u64) -> u32 {
    ((mask >> 7).wrapping_mul(ONES) >> 56) as u32
}

/// The high bits of a mask side by side: bit 0 is the first byte's.
#[inline(always)]
pub fn bits(mask: u64) -> u64 {
    (mask >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// How many bits of a number are set. eBPF has no instruction for it.
#[inline(always)]
fn ones(number: u64) -> u32 {
    let pairs = number - (number >> 1 & 0x5555_5555_5555_5555);
    let fours = (pairs & 0x3333_3333_3333_3333) + (pairs >> 2 & 0x3333_3333_3333_3333);
    let eights = (fours + (fours >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (eights.wrapping_mul(ONES) >> 56) as u32
}

/// Number of the lowest bit of a number that is not 0.
#[inline(always)]
pub fn lowest_bit(number: u64) -> u32 {
    ones((number & number.wrapping_neg()).wrapping_sub(1))
}

/// Number of the highest bit of a number that is not 0. Without a branch, each of which the verifier would follow both ways.
#[inline(always)]
pub fn highest_bit(number: u64) -> u32 {
    let mut below = number;
    below |= below >> 1;
    below |= below >> 2;
    below |= below >> 4;
    below |= below >> 8;
    below |= below >> 16;
    below |= below >> 32;
    ones(below) - 1
}

/// Bytes that are all ones, and zeros behind them.
static ENDS: [u8; 192] = {
    let mut ends = [0; 192];
    let mut i = 0;
    while i < 64 {
        ends[i] = 0xff;
        i += 1;
    }
    ends
};

/// All bits of those bytes of the word `before` bytes behind the beginning (at most 56) that belong to a text of `length`
/// bytes (at most 64). Without a branch, as [`highest_bit`].
#[inline(always)]
pub fn inside(length: u32, before: u32) -> u64 {
    let at = (opaque(64_u32.wrapping_sub(length)) & 127) + (before & 0x38);
    load(&ENDS, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The slow way: which bytes are meant.
    fn mask(word: u64, is: impl Fn(u8) -> bool) -> u64 {
        u64::from_le_bytes(word.to_le_bytes().map(|byte| if is(byte) { 0x80 } else { 0 }))
    }

    #[test]
    fn masks_are_exact_for_every_byte_beside_every_other() {
        for a in 0..=255_u8 {
            for b in 0..=255_u8 {
                let word = u64::from_le_bytes([a, b, b, a, 0x80, a, 0xff, b]);
                assert_eq!(equal(word, b'/'), mask(word, |byte| byte == b'/'));
                assert_eq!(equal(word, 0), mask(word, |byte| byte == 0));
                assert_eq!(within(word, b'0', b'9'), mask(word, |byte| byte.is_ascii_digit()));
                assert_eq!(within(word, 1, 0x7f), mask(word, |byte| (1..0x80).contains(&byte)));
                assert_eq!(strange(word), mask(word, |byte| !byte.is_ascii_graphic() && byte != b' '));
                if a < 0x80 && b < 0x80 {
                    let bytes = [b'x', b'-', a, b, b, a, a, b];
                    let is_name = |byte: &u8| {
                        let byte = byte | 0x20;
                        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
                    };
                    let end = bytes.iter().position(|byte| !is_name(byte));
                    // Controls look like others when they are made lower-case; a head that has some is refused for them.
                    let want = end.map_or((0, false), |at| (0x80 << (8 * at), bytes[at] | 0x20 == b':'));
                    assert_eq!(name_end(u64::from_le_bytes(bytes)), want, "{bytes:?}");
                }
                let host = |byte: u8| {
                    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.' | b'_')
                };
                assert_eq!(host_bytes(word), mask(word, host));
                let path = |byte: u8| byte.is_ascii_alphanumeric() || b"&'()*+,-./:@_".contains(&byte);
                assert_eq!(path_bytes(word), mask(word, path));
            }
        }
    }

    #[test]
    fn masks_are_counted_and_told() {
        for number in 0..256_u64 {
            let mask = (0..8).filter(|i| number >> i & 1 != 0).fold(0, |mask, i| mask | 0x80 << (8 * i));
            assert_eq!(bits(mask), number);
            assert_eq!(count(mask), number.count_ones());
            if number != 0 {
                assert_eq!(lowest(mask), number.trailing_zeros());
            }
        }
        for bit in 0..64 {
            for below in [0, 1, u64::MAX >> 1, 0x5555_5555_5555_5555] {
                let number = 1 << bit | below & ((1 << bit) - 1);
                assert_eq!(highest_bit(number), bit);
                assert_eq!(lowest_bit(number), number.trailing_zeros());
            }
        }
        for length in 0..=64 {
            for before in (0..64).step_by(8) {
                let want =
                    (0..8).filter(|i| before + i < length).fold(0_u64, |mask, i| mask | 0xff << (8 * i));
                assert_eq!(inside(length, before), want, "{length} {before}");
            }
        }
        assert_eq!([first(0), first(1), first(7), first(8), first(9)], [0, 0x80, HIGH >> 8, HIGH, HIGH]);
    }

    #[test]
    fn words_lie_anywhere() {
        let mut buffer: Buffer = [0; 2112];
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = i as u8;
        }
        assert_eq!(word(&buffer, 3), u64::from_le_bytes([3, 4, 5, 6, 7, 8, 9, 10]));
        assert_eq!(word(&buffer, 2047), u64::from_le_bytes([255, 0, 1, 2, 3, 4, 5, 6]));
        assert_eq!(byte(&buffer, 2047), 255);
    }
}
