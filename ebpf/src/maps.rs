//! The maps, and the only ways in which the program writes to them.

use aya_ebpf::{
    macros::map,
    maps::{PerCpuArray, PerCpuHashMap},
};
use preflightd_common::abi::{MAX_PORTS, PortCount, PortKey, uncounted};

/// The served ports and their counts. User space inserts the keys; the program only finds them.
#[map]
static PORTS: PerCpuHashMap<PortKey, PortCount> = PerCpuHashMap::with_max_entries(MAX_PORTS, 0);

/// What was not counted for a port, by the slots of [`uncounted`].
#[map]
static UNCOUNTED: PerCpuArray<u64> = PerCpuArray::with_max_entries(uncounted::SLOTS, 0);

/// Counts one packet of `bytes` for `port`; false if the port is not served.
#[inline(always)]
pub(crate) fn count(port: u16, bytes: u32) -> bool {
    let Some(count) = PORTS.get_ptr_mut(PortKey { port }) else { return false };
    // SAFETY: the map gave this pointer, the value is this CPU's own, and TC runs on a CPU one packet at a time.
    let count = unsafe { &mut *count };
    count.packets += 1;
    count.bytes += u64::from(bytes);
    true
}

/// Counts one packet in a slot of [`uncounted`].
#[inline(always)]
pub(crate) fn skip(slot: u32) {
    if let Some(count) = UNCOUNTED.get_ptr_mut(slot) {
        // SAFETY: as in `count`.
        unsafe { *count += 1 }
    }
}
