//! Waiting for the programs that run.

use std::time::Duration;

/// Longer than any program runs.
const LONG_ENOUGH: Duration = Duration::from_millis(100);

/// Returns when every run of a program that had begun has ended: `membarrier(2)`, whose global command waits for a grace
/// period of RCU (kernel/sched/membarrier.c), as programs run within one. Where it is not there, a while does.
pub(super) fn wait_for_programs() {
    #[expect(unsafe_code, reason = "no crate that is used here has the call")]
    // SAFETY: the call takes numbers only.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if done != 0 {
        std::thread::sleep(LONG_ENOUGH);
    }
}
