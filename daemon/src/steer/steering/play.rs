//! The self-test: how its connections are put before the program.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions};
use preflightd_common::abi::{
    self, Host, MAX_SOCKETS, Service as AbiService, config_flags, event, host_kind, state,
};

use super::{
    super::{Error, PRIVILEGES, object, self_test::Stage},
    Result, Steering, TEST_ROW, endpoint,
};
use crate::config::SteerMode;

/// The slot, listener and row of the self-test.
const TEST_SLOT: u32 = MAX_SOCKETS - 1;
const TEST_LISTENER: u32 = u32::MAX;
const TEST_ROOM: u32 = 8;

/// After a self-test that failed.
const TEST_AGAIN: Duration = Duration::from_mins(1);

impl Steering {
    /// Tests once, and again after a while where it failed.
    pub(super) fn test_if_due(&mut self, now: Instant) {
        let wanted =
            self.options.mode == SteerMode::Steer && self.options.self_test && self.cannot_steer.is_none();
        if !wanted || matches!(self.tested, Some(Ok(()))) || (self.tested.is_some() && now < self.times.test)
        {
            return;
        }
        self.tested = Some(self.self_test().map_err(|error| error.to_string()));
        self.times.test = Instant::now() + TEST_AGAIN;
    }

    /// One connection each way through the kernel, over loopback.
    pub(super) fn self_test(&mut self) -> Result<()> {
        let failed = |error: std::io::Error| {
            Error::new("steer a connection of our own over loopback", "see `preflightd probe`")(error)
        };
        if !self.known.iter().any(|interface| interface.loopback && interface.up) {
            return Err(failed(std::io::Error::other("loopback is down (`ip link set lo up`)")));
        }
        let families = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, "steer");
        let attach = || {
            let order = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options("lo", TcAttachType::Ingress, order)
        };
        let what = "attach to loopback for the self-test";
        let link = self.netns.enter(attach)?.map_err(Error::new(what, PRIVILEGES))?;
        let mut played = Ok(());
        let there = |ip: &IpAddr| self.known.iter().any(|interface| interface.addresses.contains(ip));
        let there: Vec<_> = families.into_iter().filter(there).collect();
        for address in there {
            played = self.play(address);
            if played.is_err() {
                break;
            }
        }
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, "steer");
        program.detach(link).map_err(Error::new("detach from loopback", PRIVILEGES))?;
        self.maps.clear_socket(TEST_SLOT);
        played
    }

    pub(super) fn play(&mut self, address: IpAddr) -> Result<()> {
        let failed = |error: std::io::Error| {
            Error::new("steer a connection of our own over loopback", "see `preflightd probe`")(error)
        };
        let stage = self.netns.enter(|| Stage::open(address))?.map_err(failed)?;
        let at = stage.address().map_err(failed)?;
        let before = self.maps.counts(self.rows.len() as u32)?;
        self.maps.set_socket(TEST_SLOT, &stage.worker)?;
        let service = AbiService {
            listener: TEST_LISTENER,
            row: TEST_ROW,
            first_socket: TEST_SLOT,
            sockets: 1,
            engaged: 1,
        };
        // The ports of the services come back with the next `apply`; an earlier daemon's are served all the while.
        self.served = None;
        self.maps.add_service(endpoint(at.ip(), at.port()), service)?;
        self.maps.add_host(Host { hash: 0, listener: TEST_LISTENER, kind: host_kind::ANY })?;
        let config = abi::Config {
            state: state::DEFER,
            percent: 100,
            window: u32::from(self.sysctls.syn_window()),
            window_scale: u32::from(self.sysctls.rcv_wscale()),
            flags: self.flags() & !config_flags::PRESSURE,
            room: TEST_ROOM,
            round: self.config.round.wrapping_add(1),
            ..self.config
        };
        self.maps.set_config(config)?;
        self.maps.beat(true)?;
        let played = self.netns.enter(|| stage.play())?.map_err(failed);
        self.maps.set_config(self.config)?;
        self.maps.remove_service(endpoint(at.ip(), at.port()))?;
        self.maps.remove_host(Host { hash: 0, listener: TEST_LISTENER, kind: host_kind::ANY })?;
        played?;
        let after = self.maps.counts(self.rows.len() as u32)?;
        if after.event(event::SynAck) < before.event(event::SynAck) + 2 {
            let left: Vec<_> = abi::fail_open::NAMES
                .iter()
                .zip(after.fail_opens.iter().zip(&before.fail_opens))
                .filter(|(_, (after, before))| after > before)
                .map(|(name, _)| *name)
                .collect();
            return Err(failed(std::io::Error::other(format!(
                "it was left to the kernel: {}",
                left.join(", ")
            ))));
        }
        Ok(())
    }
}
