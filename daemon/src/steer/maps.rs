//! The maps from user space: typed, each with what may be done to it.
#![forbid(unsafe_code)]

use std::{
    borrow::BorrowMut,
    cmp::Reverse,
    collections::{HashMap as StdMap, HashSet},
    fmt,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf, SockMap,
        lpm_trie::Key,
    },
};
use preflightd_common::{
    abi::{
        Config, Date, Endpoint, Host, Interface, MAX_DATES, MAX_HOSTS, MAX_PORTS, Pieces, Service, Template,
        Term, Value, ask, event, fail_open, kind, outcome, swept,
    },
    preflight::{line_of, mark},
    tcp::sum_of,
};
use rustix::time::{ClockId, clock_gettime};

use super::Error;
use crate::{
    http::date::imf_fixdate,
    policy::{self, ListenerId},
};

type Result<T> = std::result::Result<T, Error>;

/// How long a request that a worker turned away goes to the proxy.
const MARKED: Duration = Duration::from_mins(1);

/// All maps but those that only the programs use.
pub(super) struct Maps {
    ports: Array<MapData, u64>,
    config: Array<MapData, Config>,
    owner: Array<MapData, u32>,
    heartbeat: Array<MapData, u64>,
    keys: Array<MapData, [u64; 2]>,
    served: HashMap<MapData, Endpoint, Service>,
    interfaces: HashMap<MapData, u32, Interface>,
    routes: LpmTrie<MapData, [u32; 4], u32>,
    sockets: SockMap<MapData>,
    hosts: HashMap<MapData, Host, u32>,
    marks: Marks,
    events: PerCpuArray<MapData, u64>,
    fail_opens: PerCpuArray<MapData, u64>,
    port_counts: PerCpuArray<MapData, u64>,
    swept: Array<MapData, u32>,
    terms: HashMap<MapData, Term, Value>,
    templates: HashMap<MapData, Template, Pieces>,
    dates: Array<MapData, Date>,
    asked: PerCpuArray<MapData, u64>,
    outcomes: PerCpuArray<MapData, Outcomes>,
    samples: Option<Samples>,
}

/// What was decided on a route, by the slots of [`outcome`].
pub type Outcomes = [u64; outcome::SLOTS as usize];

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let mut of = |name: &str| ebpf.take_map(name).expect("the object has this map");
        let mut taken = || {
            Ok(Self {
                ports: of("PORTS").try_into()?,
                config: of("CONFIG").try_into()?,
                owner: of("OWNER").try_into()?,
                heartbeat: of("HEARTBEAT").try_into()?,
                keys: of("KEYS").try_into()?,
                served: of("SERVED").try_into()?,
                interfaces: of("INTERFACES").try_into()?,
                routes: of("ROUTES").try_into()?,
                sockets: of("SOCKETS").try_into()?,
                hosts: of("HOSTS").try_into()?,
                marks: Marks::new(of("MARKS"))?,
                events: of("EVENTS").try_into()?,
                fail_opens: of("FAIL_OPENS").try_into()?,
                port_counts: of("PORT_COUNTS").try_into()?,
                swept: of("SWEPT").try_into()?,
                terms: of("TERMS").try_into()?,
                templates: of("TEMPLATES").try_into()?,
                dates: of("DATES").try_into()?,
                asked: of("ASKED").try_into()?,
                outcomes: of("OUTCOMES").try_into()?,
                samples: Some(Samples(of("SAMPLES").try_into()?)),
            })
        };
        taken().map_err(failed("use the eBPF maps"))
    }

    pub(super) fn config(&self) -> Result<Config> {
        self.config.get(&0, 0).map_err(failed("read CONFIG"))
    }

    pub(super) fn set_config(&mut self, config: Config) -> Result<()> {
        self.config.set(0, config, 0).map_err(failed("write CONFIG"))
    }

    /// The number of the daemon in charge; 0: none.
    pub(super) fn owner(&self) -> Result<u32> {
        self.owner.get(&0, 0).map_err(failed("read OWNER"))
    }

    pub(super) fn set_owner(&mut self, number: u32) -> Result<()> {
        self.owner.set(0, number, 0).map_err(failed("write OWNER"))
    }

    /// Tells the programs that the daemon is well; `false`: that it is not any more.
    pub(super) fn beat(&mut self, well: bool) -> Result<()> {
        self.heartbeat.set(0, if well { monotonic() } else { 0 }, 0).map_err(failed("write HEARTBEAT"))
    }

    pub(super) fn set_key(&mut self, which: u32, key: [u64; 2]) -> Result<()> {
        self.keys.set(which, key, 0).map_err(failed("write KEYS"))
    }

    /// Serves these, and nothing else.
    pub(super) fn serve(&mut self, services: &StdMap<Endpoint, Service>) -> Result<()> {
        replace(&mut self.served, services).map_err(failed("write SERVED"))?;
        let mut bits = [0_u64; 1024];
        for endpoint in services.keys() {
            let port = u16::from_be(endpoint.port);
            bits[usize::from(port >> 6)] |= 1 << (port & 63);
        }
        (0..)
            .zip(bits)
            .try_for_each(|(index, bits)| {
                let old = self.ports.get(&index, 0)?;
                if old == bits { Ok(()) } else { self.ports.set(index, bits, 0) }
            })
            .map_err(failed("write PORTS"))
    }

    /// Serves one more, for a while.
    pub(super) fn add_service(&mut self, endpoint: Endpoint, service: Service) -> Result<()> {
        let port = u16::from_be(endpoint.port);
        let mut add = || {
            self.served.insert(endpoint, service, 0)?;
            let bits = self.ports.get(&u32::from(port >> 6), 0)?;
            self.ports.set(u32::from(port >> 6), bits | 1 << (port & 63), 0)
        };
        add().map_err(failed("write SERVED"))
    }

    /// The next [`Maps::serve`] clears its port.
    pub(super) fn remove_service(&mut self, endpoint: Endpoint) -> Result<()> {
        self.served.remove(&endpoint).map_err(failed("write SERVED"))
    }

    pub(super) fn add_host(&mut self, host: Host) -> Result<()> {
        self.hosts.insert(host, 1, 0).map_err(failed("write HOSTS"))
    }

    pub(super) fn remove_host(&mut self, host: Host) -> Result<()> {
        self.hosts.remove(&host).map_err(failed("write HOSTS"))
    }

    pub(super) fn set_interfaces(&mut self, interfaces: &StdMap<u32, Interface>) -> Result<()> {
        replace(&mut self.interfaces, interfaces).map_err(failed("write INTERFACES"))
    }

    /// Address, length of the prefix in bits (of 128), interface.
    pub(super) fn set_routes(&mut self, routes: &[([u32; 4], u32, u32)]) -> Result<()> {
        let mut set = || {
            let mut wanted = HashSet::with_capacity(routes.len());
            for (address, length, index) in routes {
                wanted.insert((*length, *address));
                self.routes.insert(&Key::new(*length, *address), index, 0)?;
            }
            let present: Vec<_> = self.routes.keys().collect::<std::result::Result<_, _>>()?;
            for key in present {
                if !wanted.contains(&(key.prefix_len(), key.data())) {
                    self.routes.remove(&key)?;
                }
            }
            Ok(())
        };
        set().map_err(failed("write ROUTES"))
    }

    /// How many of them did not fit: their preflights are the proxy's. What stands for many hosts goes first.
    pub(super) fn set_hosts(&mut self, hosts: &HashSet<Host>) -> Result<usize> {
        // While they are replaced the old and the new ones are there.
        const ROOM: usize = MAX_HOSTS as usize / 2;
        let mut hosts: Vec<_> = hosts.iter().copied().collect();
        if hosts.len() > ROOM {
            hosts.sort_unstable_by_key(|host| (Reverse(host.kind), host.listener, host.hash));
        }
        let wanted = hosts.iter().take(ROOM).map(|host| (*host, 1)).collect();
        replace(&mut self.hosts, &wanted).map_err(failed("write HOSTS"))?;
        Ok(hosts.len().saturating_sub(ROOM))
    }

    pub(super) fn set_socket(&mut self, slot: u32, socket: &impl AsRawFd) -> Result<()> {
        self.sockets.set(slot, socket, 0).map_err(failed("put a worker's socket into SOCKETS"))
    }

    pub(super) fn clear_socket(&mut self, slot: u32) {
        // It may be gone already: a socket that is closed leaves the map by itself.
        let _ = self.sockets.clear_index(&slot);
    }

    /// What the programs show; only once.
    pub(super) fn take_samples(&mut self) -> Option<Samples> {
        self.samples.take()
    }

    pub(super) fn marks(&self) -> Marks {
        self.marks.clone()
    }

    /// Of the first `rows` ports.
    pub(super) fn counts(&self, rows: u32) -> Result<Counts> {
        let read = || {
            Ok(Counts {
                events: sums(&self.events, event::SLOTS)?,
                fail_opens: sums(&self.fail_opens, fail_open::SLOTS)?,
                ports: sums(&self.port_counts, rows * kind::SLOTS)?,
                asked: sums(&self.asked, ask::SLOTS)?,
            })
        };
        read().map_err(failed("read the counters"))
    }

    /// What was decided on routes, by the numbers of their labels; at most `labels` of them.
    pub(super) fn outcomes(&self, labels: u32) -> Result<Vec<Outcomes>> {
        let read = |label| {
            let mut sum = Outcomes::default();
            for cpu in self.outcomes.get(&label, 0)?.iter() {
                for (sum, count) in sum.iter_mut().zip(cpu) {
                    *sum += count;
                }
            }
            Ok(sum)
        };
        (0..labels.min(self.outcomes.len()))
            .map(read)
            .collect::<std::result::Result<_, _>>()
            .map_err(failed("read OUTCOMES"))
    }

    /// Adds terms to those of a generation that is not in force yet.
    pub(super) fn add_terms<'t>(
        &mut self,
        generation: u32,
        terms: impl IntoIterator<Item = (&'t Term, &'t Value)>,
    ) -> Result<()> {
        terms
            .into_iter()
            .try_for_each(|(term, value)| self.terms.insert(Term { generation, ..*term }, value, 0))
            .map_err(failed("write TERMS"))
    }

    /// Adds the templates of a generation that is not in force yet.
    pub(super) fn add_templates(&mut self, generation: u32, templates: &[policy::Pieces]) -> Result<()> {
        (0..)
            .zip(templates)
            .try_for_each(|(number, pieces)| {
                self.templates.insert(Template { generation, number }, laid_out(pieces), 0)
            })
            .map_err(failed("write TEMPLATES"))
    }

    /// The terms of every other generation.
    pub(super) fn terms_but(&self, generation: u32) -> Result<Vec<Term>> {
        let others =
            self.terms.keys().filter(|term| !matches!(term, Ok(term) if term.generation == generation));
        others.collect::<std::result::Result<_, _>>().map_err(failed("read TERMS"))
    }

    /// Removes terms. Nobody may read them.
    pub(super) fn remove_terms(&mut self, terms: &[Term]) -> Result<()> {
        terms.iter().try_for_each(|term| gone(self.terms.remove(term))).map_err(failed("clear TERMS"))
    }

    /// Removes the templates of every generation but these: nobody may read them.
    pub(super) fn keep_templates(&mut self, generations: [u32; 2]) -> Result<()> {
        let mut remove = || {
            let templates: Vec<_> = self.templates.keys().collect::<std::result::Result<_, _>>()?;
            templates
                .iter()
                .filter(|template| !generations.contains(&template.generation))
                .try_for_each(|template| gone(self.templates.remove(template)))
        };
        remove().map_err(failed("clear TEMPLATES"))
    }

    /// Writes the `Date` of a second (since 1970).
    pub(super) fn set_date(&mut self, second: u32) -> Result<()> {
        let mut date = Date { second, ..Date::default() };
        let text = imf_fixdate(u64::from(second));
        date.text[..text.len()].copy_from_slice(&text);
        date.sum = sum_of(&text);
        self.dates.set(second % MAX_DATES, date, 0).map_err(failed("write DATES"))
    }

    /// Sets a port's counters to zero, for it is another port than before.
    pub(super) fn clear_row(&mut self, row: u32) -> Result<()> {
        let cpus =
            aya::util::nr_cpus().map_err(|(what, error)| Error::new(what, super::PRIVILEGES)(error))?;
        let mut clear = || {
            for column in 0..kind::SLOTS {
                let zeros = PerCpuValues::try_from(vec![0; cpus])?;
                self.port_counts.set(row * kind::SLOTS + column, zeros, 0)?;
            }
            Ok(())
        };
        clear().map_err(failed("clear a port's counters"))
    }

    pub(super) fn prepare_sweep(&mut self) -> Result<()> {
        (0..MAX_PORTS)
            .try_for_each(|row| self.swept.set(swept::SLOTS + row, 0, 0))
            .map_err(failed("prepare a sweep"))
    }

    pub(super) fn swept(&self) -> Result<Swept> {
        let read = || {
            let slots: Vec<u32> = self.swept.iter().collect::<std::result::Result<_, _>>()?;
            let (slots, silent) = slots.split_at(swept::SLOTS as usize);
            Ok(Swept { slots: slots.to_vec(), silent: silent.to_vec() })
        };
        read().map_err(failed("read what a sweep found"))
    }
}

/// First segments of connections that look like preflights, as far as the programs show them. Readable when there is one.
pub struct Samples(RingBuf<MapData>);

impl Samples {
    /// Takes all that are there: the listener, and the segment's bytes.
    pub fn each(&mut self, mut sample: impl FnMut(ListenerId, &[u8])) {
        while let Some(item) = self.0.next() {
            // As `Sample` lies in memory.
            let Some((listener, rest)) = item.split_first_chunk() else { continue };
            let Some((length, bytes)) = rest.split_first_chunk() else { continue };
            let (listener, length) = (u32::from_ne_bytes(*listener), u32::from_ne_bytes(*length));
            if let (Ok(listener), Some(bytes)) = (u16::try_from(listener), bytes.get(..length as usize)) {
                sample(ListenerId(listener), bytes);
            }
        }
    }
}

impl AsRawFd for Samples {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Samples").finish()
    }
}

/// What the programs counted, over all CPUs.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// By the slots of [`event`].
    pub events: Vec<u64>,
    /// By the slots of [`fail_open`].
    pub fail_opens: Vec<u64>,
    /// By row and the slots of [`kind`].
    pub ports: Vec<u64>,
    /// By the slots of [`ask`].
    pub asked: Vec<u64>,
}

impl Counts {
    /// Events of this slot.
    pub fn event(&self, slot: u32) -> u64 {
        self.events.get(slot as usize).copied().unwrap_or(0)
    }

    /// What connections to the port of this row turned out to be.
    pub fn port(&self, row: u32, kind: u32) -> u64 {
        self.ports.get((row * kind::SLOTS + kind) as usize).copied().unwrap_or(0)
    }
}

/// What a sweep found.
pub(super) struct Swept {
    /// By the slots of [`swept`].
    pub(super) slots: Vec<u32>,
    /// Silent clients by row.
    pub(super) silent: Vec<u32>,
}

/// Requests that a worker turned away: the client's next attempt goes to the proxy.
#[derive(Clone, Debug)]
pub struct Marks(Arc<Mutex<HashMap<MapData, u64, u64>>>);

impl Marks {
    fn new(map: Map) -> std::result::Result<Self, MapError> {
        Ok(Self(Arc::new(Mutex::new(map.try_into()?))))
    }

    /// Marks the request that `bytes` begin with, of the client at `address`.
    ///
    /// # Errors
    /// The kernel refuses the entry, or the request line is too long to be told from others.
    pub fn mark(&self, address: IpAddr, bytes: &[u8]) -> Result<()> {
        let line = line_of(bytes)
            .ok_or("its line is too long")
            .map_err(Error::new("mark a request", "let it be"))?;
        let until = monotonic() + MARKED.as_nanos() as u64;
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(mark(line, &words(address)), until, 0).map_err(failed("mark a request"))
    }
}

/// An address as in [`preflightd_common::abi::Flow`].
pub(super) fn words(address: IpAddr) -> [u32; 4] {
    let v6: Ipv6Addr = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let bytes = v6.octets();
    std::array::from_fn(|i| {
        u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}

/// An answer as `TEMPLATES` has it. The lengths were checked when it was made.
fn laid_out(pieces: &policy::Pieces) -> Pieces {
    let policy::Pieces { front, middle, origin, tail } = pieces;
    let mut out = Pieces {
        front_length: front.len() as u32,
        middle_length: middle.len() as u32,
        tail_length: tail.len() as u32,
        origin: u32::from(*origin),
        front_sum: sum_of(front),
        middle_sum: sum_of(middle),
        tail_sum: sum_of(tail),
        zero: 0,
        front: [0; _],
        middle: [0; _],
        tail: [0; _],
    };
    out.front[..front.len()].copy_from_slice(front);
    out.middle[..middle.len()].copy_from_slice(middle);
    out.tail[..tail.len()].copy_from_slice(tail);
    out
}

/// Nanoseconds of the clock that the programs read.
pub(super) fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Brings a map to what is wanted: first what is new, then away with the rest.
fn replace<M: BorrowMut<MapData>, K: Pod + Eq + std::hash::Hash, V: Pod + PartialEq>(
    map: &mut HashMap<M, K, V>,
    wanted: &StdMap<K, V>,
) -> std::result::Result<(), MapError> {
    let present: StdMap<K, V> = map.iter().collect::<std::result::Result<_, _>>()?;
    for (key, value) in wanted {
        if present.get(key) != Some(value) {
            map.insert(key, value, 0)?;
        }
    }
    for key in present.keys().filter(|key| !wanted.contains_key(key)) {
        gone(map.remove(key))?;
    }
    Ok(())
}

/// An entry that is not there any more is removed.
fn gone(result: std::result::Result<(), MapError>) -> std::result::Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

fn sums(map: &PerCpuArray<MapData, u64>, slots: u32) -> std::result::Result<Vec<u64>, MapError> {
    (0..slots).map(|slot| Ok(map.get(&slot, 0)?.iter().sum())).collect()
}

fn failed(what: &str) -> impl FnOnce(MapError) -> Error {
    Error::new(what.to_owned(), super::PRIVILEGES)
}
