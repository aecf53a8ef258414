//! Sweeps out connections that nobody goes on with. The daemon runs this now and then, by `BPF_PROG_TEST_RUN`.

use aya_ebpf::helpers::{bpf_for_each_map_elem, bpf_map_delete_elem};
use core::ffi::c_void;
use preflightd_common::abi::{Answered, Flow, Pending, TICK_SHIFT, config_flags, expiry, stage, swept};

use crate::maps;

struct Sweep {
    now: u32,
    /// How long a connection that the program has answered on may idle.
    open: u32,
    counts: [u32; swept::SLOTS as usize],
}

/// Looks at each entry once.
#[inline(always)]
pub(crate) fn sweep() {
    let flags = maps::config().map_or(0, |config| config.flags);
    let open = if flags & config_flags::CROWDED != 0 {
        expiry::OPEN_CROWDED
    } else if flags & config_flags::HALF_FULL != 0 {
        expiry::OPEN_HALF_FULL
    } else {
        expiry::OPEN
    };
    let mut sweep =
        Sweep { now: (maps::now() >> TICK_SHIFT) as u32, open, counts: [0; swept::SLOTS as usize] };
    // SAFETY: the helper calls `visit` with the map, key and value of each entry, and the pointer to `sweep`.
    unsafe {
        bpf_for_each_map_elem(
            (&raw const maps::PENDING).cast_mut().cast(),
            visit as *mut c_void,
            (&raw mut sweep).cast(),
            0,
        );
        bpf_for_each_map_elem(
            (&raw const maps::ANSWERED).cast_mut().cast(),
            visit_answered as *mut c_void,
            (&raw mut sweep).cast(),
            0,
        );
    }
    maps::note_sweep(&sweep.counts);
}

unsafe extern "C" fn visit(
    map: *mut c_void,
    key: *const Flow,
    value: *const Pending,
    sweep: *mut Sweep,
) -> i64 {
    // SAFETY: what the helper hands over.
    unsafe {
        let sweep = &mut *sweep;
        let pending = &*value;
        let (limit, slot) = match pending.stage {
            stage::OBSERVED => (expiry::OBSERVED, swept::Observed),
            stage::DEFERRED => (expiry::DEFERRED, swept::Deferred),
            stage::ACKNOWLEDGED => (expiry::ACKNOWLEDGED, swept::Acknowledged),
            _ => (expiry::GIVEN, swept::Given),
        };
        let age = sweep.now.wrapping_sub(pending.touched);
        // One that another CPU has just touched may seem to be of the future.
        if age > limit && age < u32::MAX / 2 {
            bpf_map_delete_elem(map, key.cast());
            sweep.counts[swept::Removed as usize] += 1;
            return 0;
        }
        sweep.counts[(slot & 7) as usize] += 1;
        if pending.stage == stage::ACKNOWLEDGED && age > expiry::SILENT && age < u32::MAX / 2 {
            sweep.counts[swept::Silent as usize] += 1;
            maps::count_silent(pending.row);
        }
        0
    }
}

unsafe extern "C" fn visit_answered(
    map: *mut c_void,
    key: *const Flow,
    value: *const Answered,
    sweep: *mut Sweep,
) -> i64 {
    // SAFETY: what the helper hands over.
    unsafe {
        let sweep = &mut *sweep;
        let pending = &(*value).pending;
        let limit = match pending.stage {
            stage::OPEN => sweep.open,
            stage::ENDING => expiry::ENDING,
            stage::ENDED => expiry::ENDED,
            _ => expiry::GIVEN,
        };
        let age = sweep.now.wrapping_sub(pending.touched);
        let slot = if age > limit && age < u32::MAX / 2 {
            bpf_map_delete_elem(map, key.cast());
            swept::AnsweredRemoved
        } else {
            swept::Answered
        };
        sweep.counts[slot as usize] += 1;
        0
    }
}
