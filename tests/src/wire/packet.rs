//! Frames as a [`super::Wire`] sends and reads them: Ethernet, IP, TCP and its options, checksums.
#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};

use super::{Mac, Offer, Segment, Shape, TcpOptions};

/// A TCP header to be sent.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Padded to four bytes.
    pub(super) options: Vec<u8>,
    /// The ECN bits of the IP header.
    pub(super) ecn: u8,
}

/// The frames that carry a segment, a `virtio_net_hdr` in front of each.
pub(super) fn frames(header: &Header, data: &[u8], shape: Shape, (from, to): (Mac, Mac)) -> Vec<Vec<u8>> {
    let segment = header.segment(data, shape == Shape::Partial);
    let (source, destination) = (header.source.ip(), header.destination.ip());
    let packets = ip_packets(source, destination, header.ecn, &segment, shape).into_iter();
    let frames = packets.map(|packet| {
        let mut frame = Vec::with_capacity(VNET_HEADER + 18 + packet.header.len() + packet.payload.len());
        frame.extend(vnet_header(shape == Shape::Partial, 14 + packet.header.len()));
        frame.extend(to);
        frame.extend(from);
        if let Shape::Tagged(vlan) = shape {
            frame.extend([0x81, 0x00]);
            frame.extend((0x6000 | vlan).to_be_bytes());
        }
        frame.extend(if source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        frame.extend(packet.header);
        frame.extend(packet.payload);
        frame
    });
    frames.collect()
}

/// The TCP segment in a frame from the server; `None` where it is something else.
///
/// # Panics
/// If it is one that a strict client would not take.
pub(super) fn read_frame(
    bytes: &[u8],
    macs: (Mac, Mac),
    local: IpAddr,
    server: SocketAddr,
) -> Option<Segment> {
    let (vnet, frame) = bytes.split_at(VNET_HEADER);
    let (ethernet, packet) = frame.split_at_checked(14)?;
    let fail = |what: &str| -> ! { panic!("{what}: {}", frame.escape_ascii()) };
    let (length, ip_header) = match (local, &ethernet[12..]) {
        (IpAddr::V4(local), [0x08, 0x00]) => {
            let IpAddr::V4(server) = server.ip() else { return None };
            if packet[9] != TCP || packet[12..16] != server.octets() || packet[16..20] != local.octets() {
                return None;
            }
            let header = usize::from(packet[0] & 0x0f) * 4;
            if header != 20 || fold(sum(&packet[..header], 0)) != 0xffff {
                fail("IPv4 options, or a wrong header checksum");
            }
            if be16(&packet[6..]) & 0x3fff != 0 {
                fail("a fragment");
            }
            if packet[8] == 0 {
                fail("TTL 0");
            }
            (usize::from(be16(&packet[2..])), header)
        }
        (IpAddr::V6(local), [0x86, 0xdd]) => {
            let IpAddr::V6(server) = server.ip() else { return None };
            if packet[6] != TCP || packet[8..24] != server.octets() || packet[24..40] != local.octets() {
                return None;
            }
            if packet[7] == 0 {
                fail("hop limit 0");
            }
            (40 + usize::from(be16(&packet[4..])), 40)
        }
        _ => return None,
    };
    if ethernet[..6] != macs.0 || ethernet[6..12] != macs.1 {
        fail("wrong hardware addresses");
    }
    if length != packet.len() {
        fail("the packet's length is not the frame's");
    }
    let tcp = &packet[ip_header..];
    let header = usize::from(tcp[12] >> 4) * 4;
    if header < 20 || header > tcp.len() {
        fail("a bad data offset");
    }
    let pseudo = pseudo_header(server.ip(), local, tcp.len());
    if vnet[0] & VNET_NEEDS_CSUM != 0 {
        // Hardware will sum from here, the field itself included: it must hold the pseudo-header's sum.
        let (start, offset) = (ne16(&vnet[6..]), ne16(&vnet[8..]));
        if usize::from(start) != 14 + ip_header || offset != 16 || be16(&tcp[16..]) != fold(pseudo) {
            fail("a partial checksum that hardware would complete wrongly");
        }
    } else if fold(sum(tcp, pseudo)) != 0xffff {
        fail("a wrong TCP checksum");
    }
    if be16(tcp) != server.port() {
        return None;
    }
    let data = tcp[header..].to_vec();
    let cut = if vnet[1] & !VNET_GSO_ECN == 0 { data.len() } else { usize::from(ne16(&vnet[4..])) };
    Some(Segment {
        port: be16(&tcp[2..]),
        seq: be32(&tcp[4..]),
        ack: be32(&tcp[8..]),
        flags: tcp[13],
        window: be16(&tcp[14..]),
        options: parse_options(&tcp[20..header]).unwrap_or_else(|| fail("malformed TCP options")),
        data,
        cut,
    })
}

impl Header {
    /// Header and data, with its checksum; `partial`: with the pseudo-header's sum in its place.
    fn segment(&self, data: &[u8], partial: bool) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut tcp = Vec::with_capacity(header + data.len());
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([((header / 4) << 4) as u8, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.options);
        tcp.extend(data);
        let pseudo = pseudo_header(self.source.ip(), self.destination.ip(), tcp.len());
        let checksum = if partial { fold(pseudo) } else { !fold(sum(&tcp, pseudo)) };
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        tcp
    }
}

/// The options of a SYN in Linux' order, padded.
pub(super) fn syn_options(offer: &Offer, clock: u32) -> Vec<u8> {
    let mut options = Vec::new();
    if let Some(mss) = offer.mss {
        options.extend([2, 4]);
        options.extend(mss.to_be_bytes());
    }
    if offer.sack {
        options.extend([4, 2]);
    }
    if offer.timestamps {
        options.extend([8, 10]);
        options.extend(clock.to_be_bytes());
        options.extend([0; 4]);
    }
    if let Some(shift) = offer.wscale {
        options.extend([1, 3, 3, shift]);
    }
    if offer.fast_open {
        options.extend([34, 2]);
    }
    while options.len() % 4 != 0 {
        options.push(1);
    }
    options
}

fn parse_options(mut bytes: &[u8]) -> Option<TcpOptions> {
    let mut options = TcpOptions::default();
    while let Some((&kind, rest)) = bytes.split_first() {
        match kind {
            0 => break,
            1 => bytes = rest,
            _ => {
                let length = usize::from(*rest.first()?);
                let value = bytes.get(2..length)?;
                match (kind, value.len()) {
                    (2, 2) => options.mss = Some(be16(value)),
                    (3, 1) => options.wscale = Some(value[0]),
                    (4, 0) => options.sack = true,
                    (5, 8 | 16 | 24 | 32) => {
                        options.blocks = value.chunks(8).map(|b| (be32(b), be32(&b[4..]))).collect();
                    }
                    (8, 8) => options.timestamp = Some((be32(value), be32(&value[4..]))),
                    _ => return None,
                }
                bytes = &bytes[length..];
            }
        }
    }
    Some(options)
}

/// An IP packet in two parts.
struct Packet<'a> {
    header: Vec<u8>,
    payload: &'a [u8],
}

/// The packets that carry a segment.
fn ip_packets(source: IpAddr, destination: IpAddr, ecn: u8, segment: &[u8], shape: Shape) -> Vec<Packet<'_>> {
    let mut pieces = vec![(0, segment, false)];
    if shape == Shape::Fragments {
        // The first one holds at least the TCP header (RFC 8200 §4.5); both begin at a multiple of eight bytes.
        let at = ((segment.len() / 2) & !7).max(24).min(segment.len() & !7);
        pieces = vec![(0, &segment[..at], true), (at, &segment[at..], false)];
        pieces.retain(|(_, payload, _)| !payload.is_empty());
    }
    let of_fragments = shape == Shape::Fragments;
    let headers = pieces.into_iter().map(|(at, payload, more)| {
        let header = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let options: &[u8] = if shape == Shape::IpOptions { &[1, 1, 1, 1] } else { &[] };
                let length = 20 + options.len();
                let fragment = match (of_fragments, more) {
                    (false, _) => 0x4000,
                    (true, more) => (at / 8) as u16 | if more { 0x2000 } else { 0 },
                };
                let mut header = vec![0x40 | (length / 4) as u8, ecn];
                header.extend(((length + payload.len()) as u16).to_be_bytes());
                // The identification joins the fragments of one packet: the checksum differs between packets.
                header.extend_from_slice(&segment[16..18]);
                header.extend(fragment.to_be_bytes());
                header.extend([64, TCP, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(options);
                let checksum = !fold(sum(&header, 0));
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut extension = Vec::new();
                let mut next = TCP;
                if shape == Shape::IpOptions {
                    // Destination options: four bytes of padding.
                    extension.extend([TCP, 0, 1, 4, 0, 0, 0, 0]);
                    next = 60;
                }
                if of_fragments {
                    extension.extend([TCP, 0]);
                    extension.extend((at as u16 | u16::from(more)).to_be_bytes());
                    extension.extend_from_slice(&segment[4..8]);
                    next = 44;
                }
                let mut header = vec![0x60, ecn << 4, 0, 0];
                header.extend(((extension.len() + payload.len()) as u16).to_be_bytes());
                header.extend([next, 64]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(extension);
                header
            }
            _ => panic!("{source} and {destination} are of two families"),
        };
        Packet { header, payload }
    });
    headers.collect()
}

const TCP: u8 = 6;

/// `struct virtio_net_hdr` in front of every frame: what is left for hardware to do.
const VNET_HEADER: usize = 10;
const VNET_NEEDS_CSUM: u8 = 1;
const VNET_GSO_ECN: u8 = 0x80;

fn vnet_header(partial: bool, tcp_at: usize) -> [u8; VNET_HEADER] {
    let mut header = [0; VNET_HEADER];
    if partial {
        header[0] = VNET_NEEDS_CSUM;
        header[6..8].copy_from_slice(&(tcp_at as u16).to_ne_bytes());
        header[8..10].copy_from_slice(&16u16.to_ne_bytes());
    }
    header
}

/// The sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1).
fn pseudo_header(source: IpAddr, destination: IpAddr, length: usize) -> u32 {
    let addresses = [source, destination].map(|address| match address {
        IpAddr::V4(address) => sum(&address.octets(), 0),
        IpAddr::V6(address) => sum(&address.octets(), 0),
    });
    addresses[0] + addresses[1] + u32::from(TCP) + length as u32
}

/// Adds big-endian words to a sum (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, word| {
        let word = u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn ne16(bytes: &[u8]) -> u16 {
    u16::from_ne_bytes([bytes[0], bytes[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums() {
        // RFC 1071 §3.
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), 0xddf2);
        // An odd byte counts as the high one.
        assert_eq!(fold(sum(&[1, 2, 3], 0)), 0x0402);
    }

    const MACS: (Mac, Mac) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

    fn header(source: &str, destination: &str) -> Header {
        let [source, destination] = [source, destination].map(|a| a.parse().expect("an address"));
        let options = syn_options(&Offer::LINUX, 9);
        Header { source, destination, seq: 1, ack: 2, flags: 0x18, window: 3, options, ecn: 0 }
    }

    fn read(frame: &[u8], header: &Header) -> Option<Segment> {
        read_frame(frame, (MACS.1, MACS.0), header.destination.ip(), header.source)
    }

    #[test]
    fn frames_are_read_as_they_are_written() {
        for (server, client) in [("10.0.0.1:80", "10.0.0.2:9"), ("[fd00::1]:80", "[fd00::2]:9")] {
            for shape in [Shape::Plain, Shape::Partial] {
                let header = header(server, client);
                let frame = frames(&header, b"data", shape, MACS).remove(0);
                let segment = read(&frame, &header).expect("a segment of ours");
                assert_eq!((segment.port, segment.seq, segment.ack), (9, 1, 2), "{server}, {shape:?}");
                assert_eq!(segment.data, b"data", "{server}, {shape:?}");
                assert_eq!(segment.options.mss, Some(1460), "{server}, {shape:?}");
            }
        }
    }

    /// A strict client takes nothing that a wire has bent; but for the partial checksum, which does not cover the data yet.
    #[test]
    fn bent_frames_are_not_taken() {
        for (server, client) in [("10.0.0.1:80", "10.0.0.2:9"), ("[fd00::1]:80", "[fd00::2]:9")] {
            let header = header(server, client);
            let ip_header = if header.source.is_ipv4() { 20 } else { 40 };
            let good = frames(&header, b"data", Shape::Plain, MACS).remove(0);
            for at in VNET_HEADER + 14 + ip_header..good.len() {
                let mut bent = good.clone();
                bent[at] ^= 0x10;
                let taken = std::panic::catch_unwind(|| read(&bent, &header).is_some());
                assert!(!taken.unwrap_or(false), "{server}: byte {at} bent, and taken");
            }
            let mut bent = frames(&header, b"data", Shape::Partial, MACS).remove(0);
            bent[VNET_HEADER + 14 + ip_header + 17] ^= 0x10;
            let taken = std::panic::catch_unwind(|| read(&bent, &header).is_some());
            assert!(!taken.unwrap_or(false), "{server}: a wrong partial checksum, and taken");
        }
    }

    #[test]
    fn options_are_read_as_they_are_written() {
        for (name, offer, wanted) in [
            (
                "linux",
                Offer::LINUX,
                TcpOptions {
                    mss: Some(1460),
                    wscale: Some(7),
                    sack: true,
                    timestamp: Some((9, 0)),
                    ..TcpOptions::default()
                },
            ),
            ("none", Offer::NONE, TcpOptions::default()),
        ] {
            let bytes = syn_options(&offer, 9);
            assert_eq!(bytes.len() % 4, 0, "{name}");
            assert_eq!(parse_options(&bytes), Some(wanted), "{name}");
        }
        assert_eq!(parse_options(&[2, 4, 5]), None, "cut short");
        assert_eq!(parse_options(&[2, 1]), None, "a length that covers less than itself");
    }

    #[test]
    fn fragments_join_to_the_segment() {
        let source = IpAddr::from([10, 0, 0, 1]);
        for length in [20, 24, 40, 41, 500] {
            let segment: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
            let packets = ip_packets(source, source, 0, &segment, Shape::Fragments);
            let joined: Vec<u8> = packets.iter().flat_map(|packet| packet.payload).copied().collect();
            assert_eq!(joined, segment, "{length}");
            assert!(packets.iter().rev().skip(1).all(|packet| packet.payload.len() % 8 == 0), "{length}");
        }
    }
}
