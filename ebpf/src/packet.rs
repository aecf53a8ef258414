//! The header walk: from an Ethernet frame to the TCP destination port.
//!
//! Reads go through `bpf_skb_load_bytes`, which also reaches headers outside the linear part of the packet.

use aya_ebpf::programs::TcContext;
use preflightd_common::abi::uncounted;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad (IEEE 802.1Q §9.6).
const ETHERTYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
const IPV6_LEN: usize = 40;
const IPPROTO_TCP: u8 = 6;

/// The destination port of a TCP packet, or the slot of [`uncounted`] that says why there is none.
#[inline(always)]
pub(crate) fn tcp_destination(ctx: &TcContext) -> Result<u16, u32> {
    let (ethertype, at) = network_header(ctx)?;
    let tcp = match ethertype {
        ETHERTYPE_IPV4 => behind_ipv4(ctx, at)?,
        ETHERTYPE_IPV6 => behind_ipv6(ctx, at)?,
        _ => return Err(uncounted::NOT_TCP),
    };
    load_u16(ctx, tcp + 2) // RFC 9293 §3.1: source port, then destination port
}

/// The EtherType and offset of what follows the Ethernet header and up to two VLAN tags. The kernel moves the
/// outermost tag out of the frame before TC, so that what is seen here is the inner one of two, if any.
#[inline(always)]
fn network_header(ctx: &TcContext) -> Result<(u16, usize), u32> {
    let mut ethertype = load_u16(ctx, ETHERNET_LEN - 2)?;
    let mut at = ETHERNET_LEN;
    for _ in 0..2 {
        if !ETHERTYPE_VLAN.contains(&ethertype) {
            break;
        }
        ethertype = load_u16(ctx, at + 2)?;
        at += VLAN_LEN;
    }
    Ok((ethertype, at))
}

/// RFC 791 §3.1.
#[inline(always)]
fn behind_ipv4(ctx: &TcContext, at: usize) -> Result<usize, u32> {
    let header: [u8; 10] = load(ctx, at)?;
    let len = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || len < 20 {
        return Err(uncounted::MALFORMED);
    }
    if header[9] != IPPROTO_TCP {
        return Err(uncounted::NOT_TCP);
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        return Err(uncounted::FRAGMENT);
    }
    Ok(at + len)
}

/// RFC 8200 §3.
#[inline(always)]
fn behind_ipv6(ctx: &TcContext, at: usize) -> Result<usize, u32> {
    let header: [u8; 7] = load(ctx, at)?;
    if header[0] >> 4 != 6 {
        return Err(uncounted::MALFORMED);
    }
    if header[6] != IPPROTO_TCP {
        return Err(uncounted::NOT_TCP);
    }
    Ok(at + IPV6_LEN)
}

#[inline(always)]
fn load<T>(ctx: &TcContext, at: usize) -> Result<T, u32> {
    ctx.load(at).map_err(|_| uncounted::MALFORMED)
}

#[inline(always)]
fn load_u16(ctx: &TcContext, at: usize) -> Result<u16, u32> {
    load::<[u8; 2]>(ctx, at).map(u16::from_be_bytes)
}
