//! The maps, and the ways in which the programs use them.

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::{bpf_ktime_get_ns, bpf_loop, bpf_map_lookup_elem},
    macros::map,
    maps::{
        Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SockMap,
        lpm_trie::{Key as Prefix, LpmTrie},
    },
};
use core::ffi::c_void;
use preflightd_common::{
    abi::{
        Answered, BUDGET_SHIFT, Config, DEFAULT_ANSWERED, DEFAULT_PENDING, Date, Endpoint, Flow,
        HEARTBEAT_STALE, Host, Interface, MAX_DATES, MAX_HOSTS, MAX_MARKS, MAX_PORTS, MAX_ROUTES, MAX_SERVED,
        MAX_SOCKETS, MAX_TEMPLATES, MAX_TERMS, Pending, Pieces, SAMPLES_BYTES, Service, Template, Term,
        Value, ask, event, fail_open, kind, outcome, state, swept,
    },
    cookie::Key,
    decide::Decide,
    head::Head,
    preflight::{HostHash, Scan},
    tcp::{HeaderWords, OptionBytes, Reply, Walk},
    words::Buffer,
};

use crate::answer::Body;

const NO_PREALLOC: u32 = 1; // BPF_F_NO_PREALLOC

/// One bit for each port: set if it is served. The first thing that a packet is asked.
#[map]
static PORTS: Array<u64> = Array::with_max_entries(1024, 0);

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// The number of the daemon in charge, 0: none. User space's alone: a daemon that finds another number than its own has
/// been replaced.
#[map]
static OWNER: Array<u32> = Array::with_max_entries(1, 0);

/// Nanoseconds of `CLOCK_MONOTONIC` when the daemon was last well.
#[map]
static HEARTBEAT: Array<u64> = Array::with_max_entries(1, 0);

/// The present and the previous secret; [`Config::key`] is the present one.
#[map]
static KEYS: Array<Key> = Array::with_max_entries(2, 0);

#[map]
static SERVED: HashMap<Endpoint, Service> = HashMap::with_max_entries(MAX_SERVED, 0);

#[map]
static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(1024, 0);

/// The node's unicast routes: by which interface (0: not surely one) an address is reached.
#[map]
static ROUTES: LpmTrie<[u32; 4], u32> = LpmTrie::with_max_entries(MAX_ROUTES, 0);

/// Connections between their SYN and their first data.
#[map]
pub(crate) static PENDING: LruHashMap<Flow, Pending> = LruHashMap::with_max_entries(DEFAULT_PENDING, 0);

/// Connections of which `PENDING` has no entry, each in the place that its hash gives it; whoever comes later has the place.
/// Found here, a packet costs a third of what it costs not to be found in `PENDING`; with many more connections than places
/// most are not, and pay both. CPUs may write a place at the same time; what is then torn would have to be a third
/// connection of the same place, while that one waits. Not pinned: it is true for the programs only that clear it.
#[map]
static SETTLED: Array<Flow> = Array::with_max_entries(1 << SETTLED_BITS, 0);
const SETTLED_BITS: u32 = 14;

/// Listening sockets of workers.
#[map]
static SOCKETS: SockMap = SockMap::with_max_entries(MAX_SOCKETS, 0);

/// Hosts of policies.
#[map]
static HOSTS: HashMap<Host, u32> = HashMap::with_max_entries(MAX_HOSTS, NO_PREALLOC);

/// Requests that a worker turned away, and until when (nanoseconds) they go to the proxy.
#[map]
static MARKS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(MAX_MARKS, 0);

/// Connections that the program has answered on. Not LRU, unlike `PENDING`: who has one has shown that the address is its
/// own, and keeps it; where there is no room for more, workers answer.
#[map]
pub(crate) static ANSWERED: HashMap<Flow, Answered> = HashMap::with_max_entries(DEFAULT_ANSWERED, 0);

/// What the program decides by.
#[map]
static TERMS: HashMap<Term, Value> = HashMap::with_max_entries(MAX_TERMS, NO_PREALLOC);

/// What it answers.
#[map]
static TEMPLATES: HashMap<Template, Pieces> = HashMap::with_max_entries(MAX_TEMPLATES, NO_PREALLOC);

/// The `Date` of this second and those before it, each in the place of its last digits.
#[map]
static DATES: Array<Date> = Array::with_max_entries(MAX_DATES, 0);

/// Why preflights were not the program's, by [`ask`].
#[map]
static ASKED: PerCpuArray<u64> = PerCpuArray::with_max_entries(ask::SLOTS, 0);

/// What was decided on each route, by the number of its label and the slots of [`outcome`]; the daemon says how many labels
/// there may be.
#[map]
static OUTCOMES: PerCpuArray<[u64; outcome::SLOTS as usize]> = PerCpuArray::with_max_entries(1, 0);

#[map]
static EVENTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(event::SLOTS, 0);

#[map]
static FAIL_OPENS: PerCpuArray<u64> = PerCpuArray::with_max_entries(fail_open::SLOTS, 0);

/// A row for each served port, [`kind::SLOTS`] columns.
#[map]
static PORT_COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_PORTS * kind::SLOTS, 0);

/// What a CPU has used up: of cookies and samples in a period (nanoseconds shifted by [`BUDGET_SHIFT`]), of room in a
/// round.
pub(crate) struct Budget {
    period: u64,
    cookies: u32,
    round: u32,
    entries: u32,
    samples: u32,
}

/// First segments that look like preflights, for the daemon to ask the proxy about. Not pinned: each daemon reads what its
/// own programs write.
#[map]
pub(crate) static SAMPLES: RingBuf = RingBuf::with_byte_size(SAMPLES_BYTES, 0);

#[map]
static BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// What is too large for the stack of 512 bytes, and the state of loops: the verifier knows nothing of what lies in a
/// map, so it need not follow each turn of a loop.
pub(crate) struct Scratch {
    /// A frame that is about to be written, as far as it is put together here: two bytes in front, so that what follows the
    /// Ethernet header lies at whole words, headers, and an answer up to its tail.
    pub(crate) frame: [u8; 512],
    /// A number that the verifier shall know nothing of.
    pub(crate) number: u32,
    /// By what a checksum differs from that of the pseudo-header.
    pub(crate) whole: u64,
    pub(crate) reply: Reply,
    pub(crate) new: HeaderWords,
    pub(crate) options: OptionBytes,
    pub(crate) walk: Walk,
    pub(crate) scan: Scan,
    pub(crate) host: HostWalk,
    pub(crate) reading: Head,
    pub(crate) deciding: Decide,
    pub(crate) body: Body,
    /// A connection behind the answer that is about to be sent.
    pub(crate) next: Answered,
    pub(crate) head: Buffer,
}

/// The loop over the bytes of a host, from its end.
pub(crate) struct HostWalk {
    pub(crate) hash: HostHash,
    /// Where the host ends in the head.
    pub(crate) end: u32,
    /// How long it is.
    pub(crate) length: u32,
    pub(crate) listener: u32,
    /// 1: some policy has a suffix of it.
    pub(crate) known: u32,
    /// 1: it is an IP address.
    pub(crate) address: u32,
}

/// Calls `step` with 0, 1, … and the scratch until it returns other than 0, at most `times` times (`bpf_loop`, since
/// 5.17).
#[inline(always)]
pub(crate) fn repeat(
    times: u32,
    step: unsafe extern "C" fn(u32, *mut *mut Scratch) -> i64,
    scratch: &mut Scratch,
) {
    let mut scratch = core::ptr::from_mut(scratch);
    // SAFETY: the helper calls `step` with the pointer to `scratch`, which is on this stack as the helper wants.
    unsafe {
        bpf_loop(times, step as *mut c_void, (&raw mut scratch).cast(), 0);
    }
}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Nanoseconds since the machine was started.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether the port (network order) is served.
#[inline(always)]
pub(crate) fn is_served(port: u16) -> bool {
    let port = u32::from(u16::from_be(port));
    PORTS.get(port >> 6).is_some_and(|bits| bits >> (port & 63) & 1 != 0)
}

#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Whether the daemon was well a moment ago.
#[inline(always)]
pub(crate) fn is_alive(now: u64) -> bool {
    HEARTBEAT.get(0).is_some_and(|at| now.saturating_sub(*at) < HEARTBEAT_STALE)
}

/// Whether a deferred connection may go on waiting for its first data.
#[inline(always)]
pub(crate) fn may_wait(config: &Config, flow: &Flow, now: u64) -> bool {
    service(flow).is_some_and(|service| may_answer(config, service, now))
}

/// Whether anything may be said on a port at all but what was said already.
#[inline(always)]
pub(crate) fn may_answer(config: &Config, service: &Service, now: u64) -> bool {
    config.state == state::DEFER && is_alive(now) && service.engaged != 0
}

/// The secret `which` (0 or 1).
#[inline(always)]
pub(crate) fn key(which: u32) -> Key {
    KEYS.get(which & 1).copied().unwrap_or_default()
}

#[inline(always)]
pub(crate) fn service(flow: &Flow) -> Option<&'static Service> {
    let endpoint = Endpoint { address: flow.server, port: flow.server_port, zero: 0 };
    // SAFETY: entries are replaced seldom; what is read of one that is being replaced is of either.
    unsafe { SERVED.get(endpoint) }
}

#[inline(always)]
pub(crate) fn interface(index: u32) -> Option<&'static Interface> {
    // SAFETY: as in `service`.
    unsafe { INTERFACES.get(index) }
}

/// The entry of a connection.
#[inline(always)]
pub(crate) fn pending(flow: &Flow) -> Option<*mut Pending> {
    PENDING.get_ptr_mut(flow)
}

/// The entry of a connection that the program has answered on.
#[inline(always)]
pub(crate) fn answered(flow: &Flow) -> Option<*mut Answered> {
    ANSWERED.get_ptr_mut(flow)
}

/// Makes it; false: the map is full.
#[inline(always)]
pub(crate) fn remember_answered(flow: &Flow, answered: &Answered) -> bool {
    let done = ANSWERED.insert(flow, answered, 0).is_ok();
    if done {
        count(event::AnsweredInserted);
    }
    done
}

/// Removes it.
#[inline(always)]
pub(crate) fn forget_answered(flow: &Flow) {
    if ANSWERED.remove(flow).is_ok() {
        count(event::AnsweredRemoved);
    }
}

/// What a term says.
#[inline(always)]
pub(crate) fn term(key: &Term) -> Option<&'static Value> {
    // SAFETY: terms of a generation that is in force are not changed; the daemon removes them when nobody reads them.
    unsafe { TERMS.get(key) }
}

/// The pieces of an answer.
#[inline(always)]
pub(crate) fn template(key: &Template) -> Option<&'static Pieces> {
    // SAFETY: as in `term`.
    unsafe { TEMPLATES.get(key) }
}

/// What stands in the place of a second, which may be of another one.
#[inline(always)]
pub(crate) fn date(second: u32) -> Option<&'static Date> {
    DATES.get(second % MAX_DATES)
}

/// Makes the entry of a connection, in place of one that is there with `replace`; false: the map refuses.
#[inline(always)]
pub(crate) fn remember(flow: &Flow, pending: &Pending, replace: bool) -> bool {
    const NEW_ONLY: u64 = 1; // BPF_NOEXIST
    let done = PENDING.insert(flow, pending, if replace { 0 } else { NEW_ONLY }).is_ok();
    if done {
        count(event::Inserted);
        // Afterwards: until the entry was there, a late packet of an earlier connection might have settled it again.
        unsettle(flow);
    }
    done
}

/// Whether a connection is known to have no entry.
#[inline(always)]
pub(crate) fn is_settled(flow: &Flow) -> bool {
    settled_place(flow).is_some_and(|place| *place == *flow)
}

/// Remembers that a connection has no entry; not if it has one by now: a SYN may be under way on another CPU.
#[inline(always)]
pub(crate) fn settle(flow: &Flow) {
    let Some(place) = settled_place(flow) else { return };
    *place = *flow;
    barrier(place);
    if pending(flow).is_some() || answered(flow).is_some() {
        *place = Flow::default();
    }
}

/// Whoever inserts an entry from here on sees what `place` says, or whoever has written that sees the entry.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "the kernel aligns the values of arrays to 8 bytes")]
fn barrier(place: &mut Flow) {
    let word = (&raw mut place.client).cast::<u64>();
    // SAFETY: within a value, which is aligned to 8 bytes.
    let same = unsafe { word.read() };
    // An atomic exchange is a full barrier (Documentation/atomic_t.txt), and Rust knows none on this target.
    #[cfg(target_arch = "bpf")]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("{same} = xchg_64({word} + 0, {same})", word = in(reg) word, same = inout(reg) same => _);
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = same;
}

/// A connection has an entry.
#[inline(always)]
pub(crate) fn unsettle(flow: &Flow) {
    if let Some(place) = settled_place(flow)
        && *place == *flow
    {
        *place = Flow::default();
    }
}

#[inline(always)]
fn settled_place(flow: &Flow) -> Option<&'static mut Flow> {
    let address = u64::from(flow.client[2] ^ flow.client[3]);
    let ports = u64::from(flow.client_port) << 16 | u64::from(flow.server_port);
    let hash = (address << 32 | ports).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // SAFETY: plain words, which other CPUs may write too; `SETTLED` says what comes of that.
    SETTLED.get_ptr_mut((hash >> (64 - SETTLED_BITS)) as u32).map(|place| unsafe { &mut *place })
}

/// Removes the entry of a connection.
#[inline(always)]
pub(crate) fn forget(flow: &Flow) {
    if PENDING.remove(flow).is_ok() {
        count(event::Removed);
    }
}

/// By which interface an address is reached; 0: not surely by one.
#[inline(always)]
pub(crate) fn route(address: &[u32; 4]) -> u32 {
    ROUTES.get(Prefix::new(128, *address)).copied().unwrap_or(0)
}

/// Whether some policy of the listener has this host.
#[inline(always)]
pub(crate) fn has_host(listener: u32, kind: u32, hash: u64) -> bool {
    HOSTS.get_ptr(Host { hash, listener, kind }).is_some()
}

/// Whether such a request was turned away by a worker of late.
#[inline(always)]
pub(crate) fn is_marked(mark: u64, now: u64) -> bool {
    // SAFETY: one aligned word.
    unsafe { MARKS.get(mark) }.is_some_and(|until| *until > now)
}

/// A worker's listening socket, which must be released; null: it is gone.
#[inline(always)]
pub(crate) fn worker(slot: u32) -> *mut bpf_sock {
    // SAFETY: the helper of all maps; of this kind it returns a socket.
    unsafe { bpf_map_lookup_elem((&raw const SOCKETS).cast_mut().cast(), (&raw const slot).cast()).cast() }
}

/// Takes one cookie from this CPU's budget; false: it is used up.
#[inline(always)]
pub(crate) fn take_cookie(config: &Config, now: u64) -> bool {
    let Some(budget) = BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own, and TC runs on a CPU one packet at a time.
    let budget = unsafe { &mut *budget };
    budget.begin(now);
    budget.cookies += 1;
    budget.cookies <= config.cookie_budget
}

/// Takes one sample from this CPU's budget; false: it is used up.
#[inline(always)]
pub(crate) fn take_sample(config: &Config, now: u64) -> bool {
    let Some(budget) = BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: as in `take_cookie`.
    let budget = unsafe { &mut *budget };
    budget.begin(now);
    budget.samples += 1;
    budget.samples <= config.samples
}

impl Budget {
    #[inline(always)]
    fn begin(&mut self, now: u64) {
        let period = now >> BUDGET_SHIFT;
        if self.period != period {
            self.period = period;
            self.cookies = 0;
            self.samples = 0;
        }
    }
}

/// Takes room for one entry of `PENDING` from this CPU's share; false: more might evict somebody.
#[inline(always)]
pub(crate) fn take_room(config: &Config) -> bool {
    let Some(budget) = BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: as in `take_cookie`.
    let budget = unsafe { &mut *budget };
    if budget.round != config.round {
        budget.round = config.round;
        budget.entries = 0;
    }
    budget.entries += 1;
    budget.entries <= config.room
}

#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: as in `take_cookie`; each caller takes it once.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// Counts one of [`event`], and returns how many there are on this CPU.
#[inline(always)]
pub(crate) fn count(slot: u32) -> u64 {
    add(&EVENTS, slot, 1)
}

/// Adds to one of [`event`], and returns how many there are on this CPU.
#[inline(always)]
pub(crate) fn count_by(slot: u32, by: u64) -> u64 {
    add(&EVENTS, slot, by)
}

/// Counts one of [`ask`].
#[inline(always)]
pub(crate) fn count_asked(slot: u32) {
    add(&ASKED, slot, 1);
}

/// Counts what was decided of the request in the scratch, by its route.
#[inline(always)]
pub(crate) fn count_outcome() {
    if let Some(scratch) = scratch() {
        let Some(row) = OUTCOMES.get_ptr_mut(scratch.deciding.rule.label) else { return };
        // SAFETY: as in `take_cookie`.
        unsafe { (*row)[(scratch.deciding.outcome & 7) as usize] += 1 };
    }
}

/// Counts one of [`fail_open`].
#[inline(always)]
pub(crate) fn count_fail_open(slot: u32) {
    add(&FAIL_OPENS, slot, 1);
}

/// Counts one of [`kind`] for a port.
#[inline(always)]
pub(crate) fn count_port(row: u32, column: u32) {
    add(&PORT_COUNTS, row * kind::SLOTS + column, 1);
}

#[inline(always)]
fn add(map: &PerCpuArray<u64>, slot: u32, by: u64) -> u64 {
    let Some(count) = map.get_ptr_mut(slot) else { return 0 };
    // SAFETY: as in `take_cookie`.
    let count = unsafe { &mut *count };
    *count += by;
    *count
}

/// What the last sweep found, by the slots of [`swept`]; behind them, silent clients by row of `PORT_COUNTS`.
#[map]
static SWEPT: Array<u32> = Array::with_max_entries(swept::SLOTS + MAX_PORTS, 0);

/// Counts a silent client of a port.
#[inline(always)]
pub(crate) fn count_silent(row: u16) {
    if let Some(count) = SWEPT.get_ptr_mut(swept::SLOTS + u32::from(row)) {
        // SAFETY: sweeps do not overlap.
        unsafe { *count += 1 }
    }
}

/// Leaves what a sweep found for the daemon.
#[inline(always)]
pub(crate) fn note_sweep(counts: &[u32; swept::SLOTS as usize]) {
    let mut slot = 0;
    while slot < swept::SLOTS {
        // An array has all of its slots.
        let _ = SWEPT.set(slot, counts[slot as usize], 0);
        slot += 1;
    }
}
