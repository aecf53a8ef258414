//! The maps: keys, values and named slots, laid out alike for the eBPF program and for user space.
//!
//! Every type is `repr(C)` without padding and holds no `bool`; the assertions below hold the sizes.

/// How many served ports the program can count (entries of the `PORTS` map).
pub const MAX_PORTS: u32 = 256;

/// Key of `PORTS`: a served TCP port, in the byte order of the host. A port is served if its key is in the map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// The destination port.
    pub port: u16,
}

/// Value of `PORTS`, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCount {
    /// TCP packets to the port, as TC sees them: after GRO, so one may be several segments of the wire.
    pub packets: u64,
    /// Their bytes, link-layer header included.
    pub bytes: u64,
}

/// Slots of `UNCOUNTED`: packets that were not counted for a port, by reason, one `u64` for each CPU.
pub mod uncounted {
    /// Neither TCP over IPv4 nor TCP directly behind an IPv6 header (extension headers are not walked).
    pub const NOT_TCP: u32 = 0;
    /// A later IPv4 fragment: it has no TCP header. The first one is counted.
    pub const FRAGMENT: u32 = 1;
    /// The frame ends, or contradicts itself, before the ports.
    pub const MALFORMED: u32 = 2;
    /// TCP to a port that is not served.
    pub const OTHER_PORT: u32 = 3;
    /// How many slots there are.
    pub const SLOTS: u32 = 4;
}

const _: () = assert!(size_of::<PortKey>() == 2);
const _: () = assert!(size_of::<PortCount>() == 16);

#[cfg(feature = "user")]
mod pod {
    #![expect(
        unsafe_code,
        reason = "aya's marker for types that may cross into a map is unsafe to implement"
    )]

    use super::{PortCount, PortKey};

    // SAFETY: `repr(C)` over one integer, no padding, every bit pattern is a value.
    unsafe impl aya::Pod for PortKey {}
    // SAFETY: `repr(C)` over two integers of one size, no padding, every bit pattern is a value.
    unsafe impl aya::Pod for PortCount {}
}
