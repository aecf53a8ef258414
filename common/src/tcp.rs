//! TCP headers: reading a client's options, writing our replies. Pure: the eBPF program brings the bytes.

use crate::abi::{Flow, options};

/// Bits of the flags byte (RFC 9293 §3.1).
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer counts.
    pub const URG: u8 = 0x20;
    /// ECN echo.
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

/// The option bytes of a header, zero behind their end. 64, so that any masked index is in range.
pub type OptionBytes = [u8; 64];

/// The most window scale that counts (RFC 7323 §2.3).
pub const MAX_SCALE: u8 = 14;

/// What a sender that names none takes (RFC 9293 §3.7.1).
pub const DEFAULT_MSS: u16 = 536;

/// The options that matter to us.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Timestamp value.
    pub ts_value: u32,
    /// Timestamp echo reply.
    pub ts_echo: u32,
    /// Maximum segment size; 0: not named.
    pub mss: u16,
    /// Window scale, at most [`MAX_SCALE`].
    pub scale: u8,
    /// Which of [`options`] are there.
    pub present: u8,
    /// One was odd: a length that cannot be, or an option that changes what the handshake is (TCP Fast Open, RFC 7413;
    /// MD5, RFC 2385; TCP-AO, RFC 5925).
    pub odd: u32,
}

/// Walks through options, one at a time: loops are the caller's, as eBPF has its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Walk {
    /// Where the next one begins.
    pub at: u32,
    /// How many bytes there are, at most 40.
    pub end: u32,
    /// What was found.
    pub found: Options,
}

/// So many steps always suffice.
pub const MAX_STEPS: u32 = 40;

impl Walk {
    /// Over `end` bytes.
    #[inline(always)]
    pub fn new(end: u32) -> Self {
        Self { at: 0, end, found: Options::default() }
    }

    /// Takes one option; false: that was the last one.
    #[inline(always)]
    pub fn step(&mut self, bytes: &OptionBytes) -> bool {
        const END: u8 = 0;
        const NOP: u8 = 1;
        if self.at >= self.end {
            return false;
        }
        let at = self.at;
        match byte(bytes, at) {
            END => return false,
            NOP => {
                self.at = at + 1;
                return true;
            }
            _ => {}
        }
        let length = u32::from(byte(bytes, at + 1));
        if length < 2 || at + length > self.end {
            self.found.odd = 1;
            return false;
        }
        match (byte(bytes, at), length) {
            (2, 4) => self.found.mss = u16::from(byte(bytes, at + 2)) << 8 | u16::from(byte(bytes, at + 3)),
            (3, 3) => {
                let scale = byte(bytes, at + 2);
                self.found.scale = if scale > MAX_SCALE { MAX_SCALE } else { scale };
                self.found.present |= options::WINDOW_SCALE;
            }
            (4, 2) => self.found.present |= options::SACK,
            (8, 10) => {
                self.found.ts_value = word(bytes, at + 2);
                self.found.ts_echo = word(bytes, at + 6);
                self.found.present |= options::TIMESTAMPS;
            }
            (19 | 29 | 34, _) => {
                self.found.odd = 1;
                return false;
            }
            _ => {}
        }
        self.at = at + length;
        true
    }
}

/// Reads all options, where a plain loop will do.
pub fn read_options(bytes: &[u8]) -> Options {
    let mut padded: OptionBytes = [0; 64];
    let len = bytes.len().min(40);
    padded[..len].copy_from_slice(&bytes[..len]);
    let mut walk = Walk::new(len as u32);
    while walk.step(&padded) {}
    walk.found
}

#[inline(always)]
fn byte(bytes: &OptionBytes, at: u32) -> u8 {
    bytes[(at & 63) as usize]
}

#[inline(always)]
fn word(bytes: &OptionBytes, at: u32) -> u32 {
    u32::from_be_bytes([byte(bytes, at), byte(bytes, at + 1), byte(bytes, at + 2), byte(bytes, at + 3)])
}

/// The header of a reply of ours to a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Of [`flags`].
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Our MSS; 0: not named (only SYNs do).
    pub mss: u16,
    /// Our window scale, if [`Reply::options`] has it.
    pub scale: u8,
    /// Which of [`options`] to write; SACK and window scale are a SYN's.
    pub options: u8,
    /// Timestamp value.
    pub ts_value: u32,
    /// Timestamp echo reply.
    pub ts_echo: u32,
}

/// Room for the longest header that is written here: 20 bytes, and options of 24 at most. Words of the network's order,
/// as checksums go by words.
pub type HeaderWords = [u32; 16];

impl Reply {
    /// Writes the header towards the client of `flow`, with `checksum` (network order) as it is; words behind the end
    /// are zero. Returns its length in bytes: 20 to 40. The layout of options is that of Linux (`tcp_options_write`).
    #[inline(always)]
    pub fn write(&self, flow: &Flow, checksum: u16, out: &mut HeaderWords) -> u32 {
        *out = [0; 16];
        let mut at = 5;
        if self.mss != 0 {
            out[at] = (0x0204_0000 | u32::from(self.mss)).to_be();
            at += 1;
        }
        let sack = self.options & options::SACK != 0;
        if self.options & options::TIMESTAMPS != 0 {
            // SACK permitted in place of two no-operations.
            let front: u32 = if sack { 0x0402_080a } else { 0x0101_080a };
            out[at & 15] = front.to_be();
            out[(at + 1) & 15] = self.ts_value.to_be();
            out[(at + 2) & 15] = self.ts_echo.to_be();
            at += 3;
        } else if sack {
            out[at & 15] = 0x0101_0402_u32.to_be();
            at += 1;
        }
        if self.options & options::WINDOW_SCALE != 0 {
            out[at & 15] = (0x0103_0300 | u32::from(self.scale)).to_be();
            at += 1;
        }
        out[0] = u32::from(u16::from_be(flow.server_port)) << 16 | u32::from(u16::from_be(flow.client_port));
        out[0] = out[0].to_be();
        out[1] = self.seq.to_be();
        out[2] = self.ack.to_be();
        let words = at as u32;
        out[3] = (words << 28 | u32::from(self.flags) << 16 | u32::from(self.window)).to_be();
        // The checksum is in network order already: two bytes, then the urgent pointer.
        let [high, low] = checksum.to_ne_bytes();
        out[4] = u32::from_ne_bytes([high, low, 0, 0]);
        words * 4
    }
}

/// Writes an IPv4 header of ours without options, checksum included (RFC 791 §3.1): five words. `total` is the packet's
/// length in bytes.
#[inline(always)]
pub fn ipv4_header(flow: &Flow, total: u16, out: &mut [u32; 10]) {
    const TTL_TCP: u32 = 64 << 24 | 6 << 16;
    const DONT_FRAGMENT: u32 = 0x4000;
    let first = 0x4500_0000 | u32::from(total);
    let (server, client) = (u32::from_be(flow.server[3]), u32::from_be(flow.client[3]));
    let sum = u64::from(first)
        + u64::from(DONT_FRAGMENT)
        + u64::from(TTL_TCP)
        + u64::from(server)
        + u64::from(client);
    let checksum = !fold(sum) & 0xffff;
    out[0] = first.to_be();
    out[1] = DONT_FRAGMENT.to_be();
    out[2] = (TTL_TCP | checksum).to_be();
    out[3] = flow.server[3];
    out[4] = flow.client[3];
}

/// Writes an IPv6 header of ours (RFC 8200 §3). `payload` is the length behind it in bytes.
#[inline(always)]
pub fn ipv6_header(flow: &Flow, payload: u16, out: &mut [u32; 10]) {
    const TCP_HOPS: u32 = 6 << 8 | 64;
    out[0] = 0x6000_0000_u32.to_be();
    out[1] = (u32::from(payload) << 16 | TCP_HOPS).to_be();
    let mut i = 0;
    while i < 4 {
        out[2 + i] = flow.server[i];
        out[6 + i] = flow.client[i];
        i += 1;
    }
}

/// TCP's number among IP's protocols.
pub const PROTOCOL: u16 = 6;

/// A sum of 16-bit words as one of them (RFC 1071): end-around carry.
#[inline(always)]
pub fn fold(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u32
}

/// What a folded sum of bytes is if they begin at this offset: at odd ones each byte is the other half of its word.
#[inline(always)]
pub fn sum_at(sum: u32, offset: u32) -> u64 {
    u64::from(if offset & 1 == 0 { sum } else { (sum & 0xff) << 8 | sum >> 8 })
}

/// The folded sum of bytes, in the order of memory; a zero is added to an odd number of them.
pub fn sum_of(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    fold(words.map(u64::from).sum())
}

/// Whether `a` comes behind `b` (RFC 9293 §3.4: numbers go round).
#[inline(always)]
pub fn after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX_SYN: &[u8] = &[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 1, 2, 0, 0, 0, 0, 1, 3, 3, 7];

    #[test]
    fn options_are_read() {
        let all = options::TIMESTAMPS | options::SACK | options::WINDOW_SCALE;
        let linux = Options { ts_value: 258, mss: 1460, scale: 7, present: all, ..Options::default() };
        let some = |present| Options { present, ..Options::default() };
        let odd = Options { odd: 1, ..Options::default() };
        for (name, bytes, want) in [
            ("none", &[][..], Options::default()),
            ("Linux", LINUX_SYN, linux),
            ("an end", &[0, 2, 4, 5, 0xb4], Options::default()),
            ("no-operations", &[1, 1, 1, 4, 2], some(options::SACK)),
            ("unknown", &[253, 4, 1, 2, 4, 2], some(options::SACK)),
            ("MPTCP", &[30, 4, 0, 1, 4, 2], some(options::SACK)),
            ("scale above 14", &[3, 3, 200], Options { scale: 14, ..some(options::WINDOW_SCALE) }),
            ("MSS of another length", &[2, 3, 9, 4, 2], some(options::SACK)),
            ("length 0", &[8, 0, 4, 2], odd),
            ("length 1", &[8, 1, 4, 2], odd),
            ("length beyond the end", &[4, 3], odd),
            ("no length", &[4], odd),
            ("Fast Open", &[34, 2], odd),
            ("MD5", &[[19, 18].as_slice(), &[0; 16]].concat(), odd),
            ("no-operations to the end", &[1; 40], Options::default()),
        ] {
            assert_eq!(read_options(bytes), want, "{name}");
        }
    }

    fn flow() -> Flow {
        Flow {
            client: [0, 0, 0xffff_u32.to_be(), u32::from_be_bytes([10, 77, 0, 2]).to_be()],
            server: [0, 0, 0xffff_u32.to_be(), u32::from_be_bytes([10, 77, 0, 1]).to_be()],
            client_port: 0x1234_u16.to_be(),
            server_port: 80_u16.to_be(),
        }
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_reply_is_laid_out_as_linux_does() {
        let all = options::TIMESTAMPS | options::SACK | options::WINDOW_SCALE;
        let reply = Reply {
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            flags: flags::SYN | flags::ACK,
            window: 64_240,
            mss: 1460,
            scale: 7,
            options: all,
            ts_value: 1,
            ts_echo: 2,
        };
        let mut words = [u32::MAX; 16];
        assert_eq!(reply.write(&flow(), 0xabcd_u16.to_be(), &mut words), 40);
        let head = [0, 80, 0x12, 0x34, 1, 2, 3, 4, 5, 6, 7, 8, 0xa0, 0x12, 0xfa, 0xf0, 0xab, 0xcd, 0, 0];
        let options = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 3, 3, 7];
        assert_eq!(bytes(&words), [&head[..], &options, &[0; 24]].concat());

        for (options, tail) in [
            (0, &[2, 4, 5, 0xb4][..]),
            (options::SACK, &[2, 4, 5, 0xb4, 1, 1, 4, 2]),
            (options::WINDOW_SCALE, &[2, 4, 5, 0xb4, 1, 3, 3, 7]),
            (options::TIMESTAMPS, &[2, 4, 5, 0xb4, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]),
        ] {
            let len = Reply { options, ..reply }.write(&flow(), 0, &mut words) as usize;
            let written = bytes(&words);
            assert_eq!(&written[20..len], tail, "{options:#x}");
            assert_eq!(usize::from(written[12] >> 4) * 4, len);
            assert!(written[len..].iter().all(|byte| *byte == 0));
            let back = read_options(&written[20..len]);
            assert_eq!((back.present, back.odd, back.mss), (options, 0, 1460));
        }
        let ack = Reply { mss: 0, options: options::TIMESTAMPS, ..reply };
        assert_eq!(ack.write(&flow(), 0, &mut words), 32);
        assert_eq!(&bytes(&words)[20..24], [1, 1, 8, 10]);
    }

    #[test]
    fn ip_headers() {
        let mut words = [0; 10];
        ipv4_header(&flow(), 60, &mut words);
        let v4 = bytes(&words[..5]);
        assert_eq!(v4, [0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, v4[10], v4[11], 10, 77, 0, 1, 10, 77, 0, 2]);
        let sum: u32 = v4.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum is right");
        let flow = Flow { client: [1, 2, 3, 4], server: [5, 6, 7, 8], ..flow() };
        ipv6_header(&flow, 40, &mut words);
        let v6 = bytes(&words);
        assert_eq!(&v6[..8], [0x60, 0, 0, 0, 0, 40, 6, 64]);
        assert_eq!(v6[8..], bytes(&[5, 6, 7, 8, 1, 2, 3, 4]));
    }

    #[test]
    fn sums_are_put_together() {
        let bytes: Vec<u8> = (0..=255).rev().cycle().take(701).collect();
        for cut in 0..40 {
            let (front, tail) = bytes.split_at(cut);
            let sum = u64::from(sum_of(front)) + sum_at(sum_of(tail), cut as u32);
            assert_eq!(fold(sum) % 0xffff, sum_of(&bytes) % 0xffff, "{cut}");
        }
        assert_eq!(fold(u64::MAX), 0xffff);
        assert_eq!([fold(0), fold(0xffff), fold(0x1_0000), fold(0x1_ffff_ffff)], [0, 0xffff, 1, 1]);
    }

    #[test]
    fn sequence_numbers_go_round() {
        assert!(after(1, 0) && after(0, u32::MAX) && !after(0, 0) && !after(0, 1) && !after(u32::MAX, 0));
    }
}
