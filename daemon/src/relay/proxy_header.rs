//! The PROXY protocol header (haproxy's proxy-protocol.txt, §2): who the client is, in front of its bytes.
#![forbid(unsafe_code)]

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
};

/// §2.2: no HTTP server takes these twelve bytes for a request.
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_LOCAL: u8 = 0x20;
const V2_PROXY: u8 = 0x21;
const V2_TCP4: u8 = 0x11;
const V2_TCP6: u8 = 0x21;

/// Appends the text header (§2.1).
pub(super) fn v1(client: SocketAddr, server: SocketAddr, out: &mut Vec<u8>) {
    let (from, to) = (client.ip().to_canonical(), server.ip().to_canonical());
    // Writing to a Vec does not fail.
    let _ = match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => write!(out, "PROXY TCP4 {from} {to} "),
        (IpAddr::V6(_), IpAddr::V6(_)) => write!(out, "PROXY TCP6 {from} {to} "),
        // Not from one socket.
        _ => return out.extend_from_slice(b"PROXY UNKNOWN\r\n"),
    };
    let _ = write!(out, "{} {}\r\n", client.port(), server.port());
}

/// Appends the binary header (§2.2) for a connection relayed on behalf of `client`.
pub(super) fn v2(client: SocketAddr, server: SocketAddr, out: &mut Vec<u8>) {
    match (client.ip().to_canonical(), server.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            v2_head(V2_PROXY, V2_TCP4, 12, out);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            v2_head(V2_PROXY, V2_TCP6, 36, out);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
        }
        // Not from one socket.
        _ => return v2_head(V2_PROXY, 0, 0, out),
    }
    out.extend_from_slice(&client.port().to_be_bytes());
    out.extend_from_slice(&server.port().to_be_bytes());
}

/// Appends the binary header of a connection that the sender makes for itself: every receiver must take it (§2.2).
pub(super) fn v2_local(out: &mut Vec<u8>) {
    v2_head(V2_LOCAL, 0, 0, out);
}

fn v2_head(command: u8, family: u8, length: u16, out: &mut Vec<u8>) {
    out.extend_from_slice(V2_SIGNATURE);
    out.extend_from_slice(&[command, family]);
    out.extend_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_bytes() {
        const SIG: &[u8] = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a";
        let cases: &[(&str, &str, &str, &str, &[u8])] = &[
            (
                "v4",
                "192.0.2.7:51234",
                "10.0.0.1:80",
                "PROXY TCP4 192.0.2.7 10.0.0.1 51234 80\r\n",
                b"\x21\x11\x00\x0c\xc0\x00\x02\x07\x0a\x00\x00\x01\xc8\x22\x00\x50",
            ),
            (
                "v4 on a dual-stack socket",
                "[::ffff:192.0.2.7]:51234",
                "[::ffff:10.0.0.1]:80",
                "PROXY TCP4 192.0.2.7 10.0.0.1 51234 80\r\n",
                b"\x21\x11\x00\x0c\xc0\x00\x02\x07\x0a\x00\x00\x01\xc8\x22\x00\x50",
            ),
            (
                "v6",
                "[2001:db8::7]:51234",
                "[2001:db8::1]:443",
                "PROXY TCP6 2001:db8::7 2001:db8::1 51234 443\r\n",
                b"\x21\x21\x00\x24\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\
                  \xc8\x22\x01\xbb",
            ),
        ];
        for (name, client, server, text, binary) in cases {
            let (client, server) = (client.parse().expect(name), server.parse().expect(name));
            let mut out = Vec::new();
            v1(client, server, &mut out);
            assert_eq!(str::from_utf8(&out).expect(name), *text, "{name}");
            let mut out = Vec::new();
            v2(client, server, &mut out);
            assert_eq!(out, [SIG, binary].concat(), "{name}");
        }
        let mut out = Vec::new();
        v2_local(&mut out);
        assert_eq!(out, [SIG, b"\x20\0\0\0"].concat());
    }
}
