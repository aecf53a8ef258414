//! The kernel's part: loads the eBPF object that the build embedded and attaches it to interfaces.
//!
//! For now one program: [`Counter`] counts the TCP packets that arrive for the served ports. It never changes, drops
//! or redirects a packet, and is gone with its last handle, or with the process.

use std::{error, fmt};

use aya::{
    Ebpf,
    maps::{MapError, PerCpuArray, PerCpuHashMap, PerCpuValues},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, TcAttachOptions, TcError},
    },
    util::KernelVersion,
};
use preflightd_common::abi::{MAX_PORTS, PortKey, uncounted};

pub mod interfaces;
pub mod netns;
pub mod sysctl;

pub use preflightd_common::abi::PortCount;

/// The object that `build.rs` made from the crate `ebpf/`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/preflightd-ebpf"));

/// How a TC program hangs on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A TCX link before every other TCX program. Nothing stays behind once its owner is gone, however it died.
    ///
    /// # Minimum kernel version
    /// 6.6.
    Tcx,
    /// A filter on the `clsact` qdisc, which is added to the interface if it is not there and then stays. After a
    /// `SIGKILL` the filter stays too: `tc filter del dev IF ingress`.
    ///
    /// # Minimum kernel version
    /// 4.5.
    Clsact,
}

impl Hook {
    /// The better hook that the running kernel has.
    ///
    /// # Errors
    /// If the kernel does not tell its version.
    pub fn for_this_kernel() -> Result<Self, Error> {
        let kernel = KernelVersion::current()
            .map_err(Error::new("read the kernel's version", "mount /proc, or name the hook"))?;
        Ok(if kernel >= KernelVersion::new(6, 6, 0) { Self::Tcx } else { Self::Clsact })
    }
}

/// Counts the TCP packets that arrive on one interface for the served ports, for IPv4 and IPv6, VLAN-tagged or not.
///
/// Packets are what TC sees: after GRO, so one may be several segments of the wire; those with IPv6 extension headers
/// and IPv4 fragments but the first are not counted for a port. Dropping the counter detaches it.
///
/// # Minimum kernel version
/// That of its [`Hook`]. Needs `CAP_BPF` and `CAP_NET_ADMIN`, or root.
#[derive(Debug)]
pub struct Counter {
    ebpf: Ebpf,
}

impl Counter {
    /// Loads the program and attaches it to the ingress of `interface`, an Ethernet (or loopback) device in the network
    /// namespace of the calling thread. `ports` are the served ports; a port named twice counts once.
    ///
    /// # Errors
    /// If there are more than [`MAX_PORTS`] ports, the kernel refuses the program, or there is no such interface. The
    /// message says what to do about it.
    pub fn attach(interface: &str, ports: &[u16], hook: Hook) -> Result<Self, Error> {
        let mut counter = Self::load(ports)?;
        let what = format!("attach to the ingress of {interface} by {hook:?}");
        let remedy = "check the interface's name and namespace (`ip link`)";
        let options = match hook {
            Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            Hook::Clsact => {
                match tc::qdisc_add_clsact(interface) {
                    Ok(()) | Err(TcError::AlreadyAttached) => {}
                    Err(error) => return Err(Error::new(what, remedy)(error)),
                }
                TcAttachOptions::Netlink(NlOptions::default())
            }
        };
        counter
            .program()
            .attach_with_options(interface, TcAttachType::Ingress, options)
            .map_err(Error::new(what, remedy))?;
        tracing::info!(interface, ?ports, ?hook, "counting packets to the served ports");
        Ok(counter)
    }

    /// What arrived for `port` since the start, over all CPUs. A port that is not served has the count of zero.
    ///
    /// # Errors
    /// If the kernel refuses to read the map.
    pub fn count(&self, port: u16) -> Result<PortCount, Error> {
        let map = self.ebpf.map("PORTS").expect("the object has this map");
        let read = || PerCpuHashMap::<_, PortKey, PortCount>::try_from(map)?.get(&PortKey { port }, 0);
        match read() {
            Ok(per_cpu) => Ok(per_cpu.iter().fold(PortCount::default(), |sum, cpu| PortCount {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
            })),
            Err(MapError::KeyNotFound) => Ok(PortCount::default()),
            Err(error) => Err(Error::new(format!("read the count of port {port}"), PRIVILEGES)(error)),
        }
    }

    /// The packets that were counted for no port, by reason.
    ///
    /// # Errors
    /// If the kernel refuses to read the map.
    pub fn uncounted(&self) -> Result<Uncounted, Error> {
        let map = self.ebpf.map("UNCOUNTED").expect("the object has this map");
        let read = |slot| Ok(PerCpuArray::<_, u64>::try_from(map)?.get(&slot, 0)?.iter().sum());
        let read = |slot| {
            read(slot).map_err(|error: MapError| Error::new("read the uncounted packets", PRIVILEGES)(error))
        };
        Ok(Uncounted {
            not_tcp: read(uncounted::NOT_TCP)?,
            fragment: read(uncounted::FRAGMENT)?,
            malformed: read(uncounted::MALFORMED)?,
            other_port: read(uncounted::OTHER_PORT)?,
        })
    }

    fn load(ports: &[u16]) -> Result<Self, Error> {
        let mut counter =
            Self { ebpf: Ebpf::load(OBJECT).map_err(Error::new("load the eBPF maps", PRIVILEGES))? };
        let map = counter.ebpf.map_mut("PORTS").expect("the object has this map");
        let serve = || {
            let mut map = PerCpuHashMap::<_, PortKey, PortCount>::try_from(map)?;
            let zeros = vec![PortCount::default(); aya::util::nr_cpus().map_err(|(_, error)| error)?];
            for &port in ports {
                map.insert(PortKey { port }, PerCpuValues::try_from(zeros.clone())?, 0)?;
            }
            Ok(())
        };
        serve().map_err(|error: MapError| {
            let what = format!("serve {} ports", ports.len());
            Error::new(what, format!("serve {MAX_PORTS} ports at most"))(error)
        })?;
        counter.program().load().map_err(Error::new("load the eBPF program", PRIVILEGES))?;
        Ok(counter)
    }

    fn program(&mut self) -> &mut SchedClassifier {
        let program = self.ebpf.program_mut("count_served").expect("the object has this program");
        program.try_into().expect("it is a classifier")
    }
}

/// Packets that were counted for no port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uncounted {
    /// Not TCP, or TCP behind IPv6 extension headers.
    pub not_tcp: u64,
    /// IPv4 fragments but the first.
    pub fragment: u64,
    /// Frames that end, or contradict themselves, before the ports.
    pub malformed: u64,
    /// TCP to a port that is not served.
    pub other_port: u64,
}

const PRIVILEGES: &str = "run as root, or with CAP_BPF and CAP_NET_ADMIN";

/// Why the kernel's part does not work: what was being done, the cause, and what to do about it.
#[derive(Debug)]
pub struct Error {
    what: String,
    remedy: String,
    cause: Box<dyn error::Error + Send + Sync>,
}

impl Error {
    fn new<E: Into<Box<dyn error::Error + Send + Sync>>>(
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        |cause| Self { what: what.into(), remedy: remedy.into(), cause: cause.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.cause)?;
        let mut source = self.cause.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        write!(f, "; {}", self.remedy)
    }
}

impl error::Error for Error {}

#[cfg(test)]
mod tests {
    use aya::programs::{TestRun as _, TestRunOptions};

    use super::*;

    const SERVED: u16 = 8080;
    const OTHER: u16 = 8081;

    /// Runs the program on single frames (`BPF_PROG_TEST_RUN`); needs root.
    #[test]
    fn one_frame_goes_to_exactly_one_counter() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this test as root");
            eprintln!("skipped: loading an eBPF program needs root");
            return;
        }
        let counted = |packets, bytes| (PortCount { packets, bytes }, Uncounted::default());
        let skipped = |skipped| (PortCount::default(), skipped);
        let not_tcp = skipped(Uncounted { not_tcp: 1, ..Uncounted::default() });
        let fragment = skipped(Uncounted { fragment: 1, ..Uncounted::default() });
        let malformed = skipped(Uncounted { malformed: 1, ..Uncounted::default() });
        let other_port = skipped(Uncounted { other_port: 1, ..Uncounted::default() });

        let v4 = |port| frame(&[], &ipv4(5, 0, 6), &tcp(port));
        let v6 = |port| frame(&[], &ipv6(6), &tcp(port));
        for (name, frame, want) in [
            ("IPv4", v4(SERVED), counted(1, 54)),
            ("IPv6", v6(SERVED), counted(1, 74)),
            ("IPv4, options", frame(&[], &ipv4(15, 0, 6), &tcp(SERVED)), counted(1, 94)),
            ("IPv4, don't fragment", frame(&[], &ipv4(5, 0x4000, 6), &tcp(SERVED)), counted(1, 54)),
            ("IPv4, first fragment", frame(&[], &ipv4(5, 0x2000, 6), &tcp(SERVED)), counted(1, 54)),
            ("IPv4, VLAN", frame(&[0x8100], &ipv4(5, 0, 6), &tcp(SERVED)), counted(1, 58)),
            ("IPv6, two VLANs", frame(&[0x88a8, 0x8100], &ipv6(6), &tcp(SERVED)), counted(1, 82)),
            ("IPv4, other port", v4(OTHER), other_port),
            ("IPv6, other port", v6(OTHER), other_port),
            ("IPv4, the port's bytes swapped", v4(SERVED.swap_bytes()), other_port),
            ("IPv4, later fragment", frame(&[], &ipv4(5, 0x2001, 6), &tcp(SERVED)), fragment),
            ("IPv4, last fragment", frame(&[], &ipv4(5, 0x1fff, 6), &tcp(SERVED)), fragment),
            ("IPv4, UDP", frame(&[], &ipv4(5, 0, 17), &tcp(SERVED)), not_tcp),
            ("IPv6, UDP", frame(&[], &ipv6(17), &tcp(SERVED)), not_tcp),
            ("IPv6, extension header", frame(&[], &ipv6(0), &tcp(SERVED)), not_tcp),
            ("three VLANs", frame(&[0x88a8, 0x8100, 0x8100], &ipv4(5, 0, 6), &tcp(SERVED)), not_tcp),
            ("IPv4, header too short to be one", frame(&[], &ipv4(4, 0, 6), &tcp(SERVED)), malformed),
            ("IPv4 by EtherType, IPv6 by version", v4_with_version(6), malformed),
            ("IPv4, cut in its header", frame(&[0x8100], &ipv4(5, 0, 6), &[])[..27].to_vec(), malformed),
            ("IPv4, cut in its options", frame(&[], &ipv4(15, 0, 6), &[])[..40].to_vec(), malformed),
            ("IPv4, cut in its ports", v4(SERVED)[..37].to_vec(), malformed),
            ("IPv4, cut behind its ports", v4(SERVED)[..38].to_vec(), counted(1, 38)),
            ("IPv6, cut in its header", frame(&[0x8100], &ipv6(6), &[])[..24].to_vec(), malformed),
            ("IPv6, cut in its ports", v6(SERVED)[..57].to_vec(), malformed),
        ] {
            let mut counter = Counter::load(&[SERVED]).expect(name);
            let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
            let verdict = counter.program().test_run(options).expect(name).return_value;
            assert_eq!(verdict.cast_signed(), -1, "{name}: the packet goes on to the next program");
            let got = (counter.count(SERVED).expect(name), counter.uncounted().expect(name));
            assert_eq!(got, want, "{name}");
        }
    }

    fn frame(vlans: &[u16], ip: &[u8], tcp: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for vlan in vlans {
            frame.extend(vlan.to_be_bytes());
            frame.extend([0, 5]);
        }
        frame.extend(if ip[0] >> 4 == 6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        frame.extend(ip);
        frame.extend(tcp);
        frame
    }

    fn ipv4(words: u8, flags_and_offset: u16, protocol: u8) -> Vec<u8> {
        let mut header = vec![0; usize::from(words) * 4];
        header[0] = 0x40 | words;
        header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
        header[9] = protocol;
        header
    }

    fn ipv6(next_header: u8) -> Vec<u8> {
        let mut header = vec![0; 40];
        header[0] = 0x60;
        header[6] = next_header;
        header
    }

    fn tcp(port: u16) -> Vec<u8> {
        let mut header = vec![0; 20];
        header[..2].copy_from_slice(&50_000_u16.to_be_bytes());
        header[2..4].copy_from_slice(&port.to_be_bytes());
        header
    }

    fn v4_with_version(version: u8) -> Vec<u8> {
        let mut frame = frame(&[], &ipv4(5, 0, 6), &tcp(SERVED));
        frame[14] = version << 4 | 5;
        frame
    }
}
