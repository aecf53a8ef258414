//! The kernel settings that steering depends on, as they are in the network namespace of the calling thread.
#![forbid(unsafe_code)]

use std::{fs, io, str::FromStr};

/// `TCP_MAX_WSCALE` of `include/net/tcp.h`.
const MAX_WSCALE: u32 = 14;
/// The window that Linux offers first on an Ethernet: 44 segments of 1460 bytes.
const FIRST_WINDOW: u32 = 64_240;

/// What was read. A setting that the kernel does not have (or does not show in a namespace that is not the first) has
/// the value that is on the careful side, named with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctls {
    /// `net.ipv4.tcp_syncookies`; 0 if the kernel was built without them: then nothing can be deferred.
    pub syncookies: u8,
    /// `net.ipv4.tcp_timestamps` is not 0; else false.
    pub timestamps: bool,
    /// `net.ipv4.tcp_sack`; else false.
    pub sack: bool,
    /// `net.ipv4.tcp_window_scaling`; else false.
    pub window_scaling: bool,
    /// `net.ipv4.tcp_ecn`: 0 never, 1 always, 2 if the peer asks; else 0.
    pub ecn: u8,
    /// `net.ipv4.tcp_rmem` in bytes: least, first, most; else the kernel's own defaults.
    pub rmem: [u32; 3],
    /// `net.core.rmem_max` in bytes; else the kernel's own default.
    pub rmem_max: u32,
    /// `net.core.somaxconn`, the bound of a listener's queue; else 128, the least that kernels had.
    pub somaxconn: u32,
    /// `kernel.bpf_stats_enabled`: the kernel measures eBPF programs, which costs time; else false.
    pub bpf_stats: bool,
    /// `net.ipv4.ip_forward`: the node routes IPv4 for others; else false.
    pub ip_forward: bool,
    /// `net.ipv4.conf.lo.forwarding`, which `bpf_fib_lookup` asks for; else false.
    pub lo_forwarding_v4: bool,
    /// `net.ipv6.conf.lo.forwarding`, which `bpf_fib_lookup` asks for; else false.
    pub lo_forwarding_v6: bool,
}

impl Sysctls {
    /// Reads them in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If `/proc/sys` is not there, or a setting cannot be read or is no number.
    pub fn read() -> io::Result<Self> {
        // A /proc/sys that is hidden must not look like a kernel that lacks everything.
        fs::metadata("/proc/sys/net/ipv4").map_err(|error| said("/proc/sys/net/ipv4", &error))?;
        Self::read_by(|name| {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            match fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(said(&path, &error)),
            }
        })
    }

    fn read_by(read: impl Fn(&str) -> io::Result<Option<String>>) -> io::Result<Self> {
        let number = |name: &str, otherwise: u32| match read(name)? {
            Some(text) => parse(name, &text),
            None => Ok(otherwise),
        };
        let small = |name: &str| number(name, 0).map(|value| u8::try_from(value).unwrap_or(u8::MAX));
        let is_on = |name: &str| Ok::<_, io::Error>(number(name, 0)? != 0);
        let rmem = match read("net.ipv4.tcp_rmem")? {
            Some(text) => {
                let mut three = text.split_whitespace().map(|word| parse("net.ipv4.tcp_rmem", word));
                let mut next = || {
                    three.next().unwrap_or_else(|| Err(invalid("net.ipv4.tcp_rmem", &text, "three numbers")))
                };
                [next()?, next()?, next()?]
            }
            None => [4_096, 131_072, 6_291_456],
        };
        Ok(Self {
            syncookies: small("net.ipv4.tcp_syncookies")?,
            timestamps: is_on("net.ipv4.tcp_timestamps")?,
            sack: is_on("net.ipv4.tcp_sack")?,
            window_scaling: is_on("net.ipv4.tcp_window_scaling")?,
            ecn: small("net.ipv4.tcp_ecn")?,
            rmem,
            rmem_max: number("net.core.rmem_max", 212_992)?,
            somaxconn: number("net.core.somaxconn", 128)?,
            bpf_stats: is_on("kernel.bpf_stats_enabled")?,
            ip_forward: is_on("net.ipv4.ip_forward")?,
            lo_forwarding_v4: is_on("net.ipv4.conf.lo.forwarding")?,
            lo_forwarding_v6: is_on("net.ipv6.conf.lo.forwarding")?,
        })
    }

    /// The window scale that the kernel would offer: that of the largest window that may be needed.
    /// `tcp_select_initial_window` in `net/ipv4/tcp_output.c`, for a listener whose buffer nobody set (`SO_RCVBUF`).
    pub fn rcv_wscale(&self) -> u8 {
        if !self.window_scaling {
            return 0;
        }
        let clamp = u32::from(u16::MAX) << MAX_WSCALE;
        let space = self.rmem[2].max(self.rmem_max).min(clamp);
        let scale = space.checked_ilog2().unwrap_or(0).saturating_sub(15).min(MAX_WSCALE);
        scale as u8
    }

    /// The window that a SYN-ACK offers, in bytes; it is never scaled. Half of the first buffer, as the kernel counts
    /// the other half for its own bookkeeping.
    pub fn syn_window(&self) -> u16 {
        u16::try_from((self.rmem[1] / 2).min(FIRST_WINDOW)).expect("no more than 64240")
    }
}

fn parse<T: FromStr>(name: &str, text: &str) -> io::Result<T> {
    text.trim().parse().map_err(|_| invalid(name, text, "a number"))
}

fn invalid(name: &str, text: &str, wanted: &str) -> io::Error {
    let text = text.trim();
    io::Error::new(io::ErrorKind::InvalidData, format!("{name} is `{text}` instead of {wanted}"))
}

fn said(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read {path}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        process::Command,
    };

    use super::*;
    use crate::steer::netns::tests::{Scratch, have_root};

    fn defaults() -> Sysctls {
        let Ok(sysctls) = Sysctls::read_by(|_| Ok(None)) else { unreachable!("nothing to get wrong") };
        Sysctls { window_scaling: true, ..sysctls }
    }

    #[test]
    fn what_is_missing_is_on_the_careful_side() {
        let got = Sysctls::read_by(|_| Ok(None)).expect("nothing to get wrong");
        let want = Sysctls {
            syncookies: 0,
            timestamps: false,
            sack: false,
            window_scaling: false,
            ecn: 0,
            rmem: [4_096, 131_072, 6_291_456],
            rmem_max: 212_992,
            somaxconn: 128,
            bpf_stats: false,
            ip_forward: false,
            lo_forwarding_v4: false,
            lo_forwarding_v6: false,
        };
        assert_eq!(got, want);
        assert_eq!(got.rcv_wscale(), 0, "without window scaling");
    }

    #[test]
    fn what_is_no_number_is_an_error_with_its_name() {
        for (name, text) in [
            ("net.ipv4.tcp_syncookies", "yes"),
            ("net.ipv4.tcp_rmem", "4096\t131072"),
            ("net.ipv4.tcp_rmem", "4096 many 6291456"),
        ] {
            let read = |asked: &str| Ok((asked == name).then(|| text.to_owned()));
            let error = Sysctls::read_by(read).expect_err(text).to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn the_window_scale_is_the_kernels() {
        for (rmem_most, rmem_max, want) in [
            (6_291_456, 212_992, 7),
            (33_554_432, 212_992, 10),
            (131_072, 212_992, 2),
            (65_535, 65_535, 0),
            (65_536, 4_096, 1),
            (4_096, 4_096, 0),
            (0, 0, 0),
            (6_291_456, 16_777_216, 9),
            (2_147_483_647, 212_992, 14),
            (u32::MAX, u32::MAX, 14),
        ] {
            let sysctls = Sysctls { rmem: [4_096, 131_072, rmem_most], rmem_max, ..defaults() };
            assert_eq!(sysctls.rcv_wscale(), want, "{rmem_most} {rmem_max}");
        }
    }

    #[test]
    fn the_first_window_fits_its_field() {
        for (first, want) in
            [(131_072, 64_240), (128_480, 64_240), (65_536, 32_768), (4_096, 2_048), (u32::MAX, 64_240)]
        {
            let sysctls = Sysctls { rmem: [4_096, first, 6_291_456], ..defaults() };
            assert_eq!(sysctls.syn_window(), want, "{first}");
        }
    }

    #[test]
    fn each_namespace_has_its_own() {
        if !have_root() {
            return;
        }
        let scratch = Scratch::new("sysctl");
        let read = || scratch.open().enter(Sysctls::read).expect("entered").expect("read");
        scratch.sysctl("net/ipv4/tcp_syncookies", "0");
        scratch.sysctl("net/ipv4/tcp_rmem", "4096 65536 1048576");
        let before = Sysctls::read().expect("our own");
        let inside = read();
        assert_eq!((inside.syncookies, inside.rmem), (0, [4_096, 65_536, 1_048_576]));
        // What the kernel's own handshake offers there.
        let spoken = scratch.open().enter(|| {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
            let address = listener.local_addr().expect("its address");
            let _client = TcpStream::connect(address).expect("a connection");
            let _accepted = listener.accept().expect("accepted");
            let ss = ["-Htin", "state", "established", &format!("sport = :{}", address.port())];
            let ss = Command::new("ss").args(ss).output().expect("ss can be run");
            String::from_utf8_lossy(&ss.stdout).into_owned()
        });
        let spoken = spoken.expect("entered");
        // Theirs, ours; both ends have the same settings.
        let scales = format!("wscale:{0},{0}", inside.rcv_wscale());
        assert!(inside.rcv_wscale() > 0 && spoken.contains(&scales), "{scales}: {spoken}");
        scratch.sysctl("net/ipv4/tcp_syncookies", "1");
        assert_eq!(read().syncookies, 1);
        assert_eq!(Sysctls::read().expect("our own"), before);
    }
}
