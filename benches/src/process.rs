//! What processes cost: CPU time and memory from `/proc`, and whether anything else was running meanwhile.
#![forbid(unsafe_code)]

use crate::cpu::Cpus;
use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

/// CPU time of a process, all threads summed.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTime {
    /// Nanoseconds on a CPU, user and kernel.
    pub running: u64,
    /// Nanoseconds in which it could have run but another task had the CPU.
    pub waiting: u64,
}

impl CpuTime {
    /// Of process `pid`, from its threads' `schedstat` (kernel: Documentation/scheduler/sched-stats.rst).
    ///
    /// # Errors
    /// The process is gone, or the kernel keeps no such statistics.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut sum = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let Some(time) = schedstat(&task?.path())? else { continue };
            sum.running += time.running;
            sum.waiting += time.waiting;
        }
        Ok(sum)
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            running: self.running.saturating_sub(earlier.running),
            waiting: self.waiting.saturating_sub(earlier.waiting),
        }
    }
}

/// Resident memory of a process in bytes.
pub fn resident(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::other(format!("reading memory of process {pid}: no VmRSS")))
}

/// Every task's CPU time at one moment, and the time that a hypervisor kept from us.
#[derive(Debug)]
pub struct Everyone {
    tasks: HashMap<u32, u64>,
    stolen: Duration,
}

impl Everyone {
    /// Takes the snapshot: a millisecond or so, thus outside of what is measured.
    pub fn now() -> io::Result<Self> {
        let mut tasks = HashMap::new();
        for_each_task(|tid, dir| {
            if let Ok(Some(time)) = schedstat(dir) {
                tasks.insert(tid, time.running);
            }
        })?;
        Ok(Self { tasks, stolen: stolen()? })
    }

    /// What tasks of none of the processes `ours` have taken of either of `cpus` since the snapshot.
    pub fn others_since(&self, ours: &[u32], cpus: Cpus) -> io::Result<Others> {
        let mut others = Others { work: stolen()?.saturating_sub(self.stolen), kernel: Duration::ZERO };
        let ours: Vec<_> = ours.iter().map(|pid| Path::new("/proc").join(pid.to_string())).collect();
        for_each_task(|tid, dir| {
            if ours.iter().any(|process| dir.starts_with(process)) {
                return;
            }
            let Ok(Some(time)) = schedstat(dir) else { return };
            let spent = time.running.saturating_sub(self.tasks.get(&tid).copied().unwrap_or(0));
            if spent == 0 {
                return;
            }
            let Some((name, cpu, is_kernel)) = name_and_cpu(dir) else { return };
            if cpu == cpus.server || cpu == cpus.client {
                let is_load = is_kernel && WORK_FOR_LOAD.iter().any(|prefix| name.starts_with(prefix));
                let sum = if is_load { &mut others.kernel } else { &mut others.work };
                *sum += Duration::from_nanos(spent);
            }
        })?;
        Ok(others)
    }
}

/// What the two CPUs did, whoever asked for it: interrupts and the network stack count too, which are nobody's.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    at: Instant,
    idle: Cpus<Duration>,
}

impl Busy {
    /// The clocks now. The kernel shows them in steps of 10 ms.
    pub fn now(cpus: Cpus) -> io::Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let idle = |cpu: usize| {
            let name = format!("cpu{cpu}");
            let mut fields = stat.lines().map(str::split_ascii_whitespace);
            let mut fields = fields.find_map(|mut line| (line.next()? == name).then_some(line))?.skip(3);
            let mut ticks = || fields.next()?.parse::<u64>().ok();
            Some(Duration::from_millis(10 * (ticks()? + ticks()?)))
        };
        let of = |cpu| {
            idle(cpu)
                .ok_or_else(|| io::Error::other(format!("reading /proc/stat: no idle time of CPU {cpu}")))
        };
        Ok(Self { at: Instant::now(), idle: Cpus { server: of(cpus.server)?, client: of(cpus.client)? } })
    }

    /// How long each CPU was busy between `earlier` and now.
    #[must_use]
    pub fn since(self, earlier: Self) -> Cpus<Duration> {
        let busy = |now: Duration, then| (self.at - earlier.at).saturating_sub(now.saturating_sub(then));
        Cpus {
            server: busy(self.idle.server, earlier.idle.server),
            client: busy(self.idle.client, earlier.idle.client),
        }
    }
}

/// Threads of the kernel that work for the load: softirqs, RCU, and work queues, which free what RCU lets go.
const WORK_FOR_LOAD: [&str; 5] = ["ksoftirqd/", "rcu_", "rcuo", "rcuc/", "kworker/"];

/// CPU time that somebody else has taken.
#[derive(Clone, Copy, Debug)]
pub struct Others {
    /// Other tasks, and what a hypervisor kept from us.
    pub work: Duration,
    /// [`WORK_FOR_LOAD`]: not against it.
    pub kernel: Duration,
}

/// Time stolen on all CPUs, in the kernel's steps of 10 ms.
fn stolen() -> io::Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let ticks =
        stat.lines().next().and_then(|line| line.split_ascii_whitespace().nth(8)?.parse::<u64>().ok());
    Ok(Duration::from_millis(ticks.unwrap_or(0) * 10))
}

fn for_each_task(mut visit: impl FnMut(u32, &Path)) -> io::Result<()> {
    for process in fs::read_dir("/proc")? {
        let process = process?;
        if process.file_name().to_str().is_none_or(|name| name.parse::<u32>().is_err()) {
            continue;
        }
        // Processes may end while we look.
        let Ok(tasks) = fs::read_dir(process.path().join("task")) else { continue };
        for task in tasks.flatten() {
            if let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok()) {
                visit(tid, &task.path());
            }
        }
    }
    Ok(())
}

/// `None`: the task is gone.
fn schedstat(task: &Path) -> io::Result<Option<CpuTime>> {
    let text = match fs::read_to_string(task.join("schedstat")) {
        Ok(text) => text,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(running)), Some(Ok(waiting))) => Ok(Some(CpuTime { running, waiting })),
        _ => Err(io::Error::other(format!("reading {}/schedstat: not numbers: {text:?}", task.display()))),
    }
}

/// A task's name, the CPU it ran on last, and whether it is the kernel's; `None`: it is gone.
fn name_and_cpu(task: &Path) -> Option<(String, usize, bool)> {
    const PF_KTHREAD: u64 = 0x0020_0000; // include/linux/sched.h
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    // The name stands in parentheses and may hold anything, so count fields behind the last one (proc(5)).
    let (head, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let flags: u64 = fields.nth(6)?.parse().ok()?;
    let cpu = fields.nth(29)?.parse().ok()?;
    Some((head.split_once('(')?.1.to_owned(), cpu, flags & PF_KTHREAD != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process;

    #[test]
    fn sees_its_own_work_and_memory() {
        let before = CpuTime::of(process::id()).expect("schedstat");
        let mut sum = 0_u64;
        for number in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
        // A system call lets the kernel bring the account up to date.
        std::thread::yield_now();
        assert!(CpuTime::of(process::id()).expect("schedstat").since(before).running > 0, "{sum}");
        assert!(resident(process::id()).expect("status") > 100_000);
    }
}
