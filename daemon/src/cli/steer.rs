//! What `run` has to do with steering, and `preflightd detach`. A build without the feature `ebpf` only says so.

#[cfg(feature = "ebpf")]
use super::print;
use super::{Detach, Failure};
use crate::{
    config::{Config, Steer},
    policy::{ListenerId, PolicySpec, Table},
    relay::TurnBack,
    telemetry::Status,
};
use std::{io, os::fd::OwnedFd};

pub(super) use imp::Steered;

/// Removes what daemons have pinned.
#[cfg(feature = "ebpf")]
pub(super) fn detach(args: &Detach) -> Result<(), Failure> {
    let done =
        crate::steer::detach(&args.pin_dir, *args.grace).map_err(|e| Failure::Failed(e.to_string()))?;
    if done.directories.is_empty() {
        print(format_args!("nothing is pinned in {}\n", args.pin_dir.display()));
        return Ok(());
    }
    for directory in &done.directories {
        print(format_args!("removed {}\n", directory.display()));
    }
    print(format_args!(
        "{} programs detached; clients that wait, and will be reset when they speak: {}\n",
        done.links, done.waiting
    ));
    Ok(())
}

#[cfg(not(feature = "ebpf"))]
pub(super) fn detach(_: &Detach) -> Result<(), Failure> {
    Err(Failure::Usage(WITHOUT.to_owned()))
}

#[cfg(not(feature = "ebpf"))]
const WITHOUT: &str = "this preflightd was built without eBPF: build it with the feature `ebpf`";

#[cfg(feature = "ebpf")]
mod imp {
    use super::{Config, ListenerId, OwnedFd, PolicySpec, Status, Steer, Table, TurnBack, io};
    use crate::steer::{Error, Service, Steering, interfaces::Watch};
    use std::{sync::Arc, time::Instant};
    use tracing::error;

    /// Steering, if any listener is steered.
    pub(in crate::cli) struct Steered(Option<Steering>, Refresh);

    /// When what was learned goes to the kernel. Its whole table is written anew then, which with many policies takes its
    /// time: one part in [`SHARE`] at most.
    #[derive(Default)]
    pub(in crate::cli) struct Refresh {
        /// Not before this.
        next: Option<Instant>,
        due: Option<(Arc<[PolicySpec]>, Arc<Table>)>,
    }

    const SHARE: u32 = 20;

    impl Steered {
        pub(in crate::cli) fn open(config: &Config, workers: usize) -> io::Result<Self> {
            let services = config.listeners.iter().enumerate().filter(|(_, listener)| listener.steer);
            let services: Vec<_> = services
                .map(|(i, listener)| Service {
                    listener: ListenerId(i as u16),
                    name: listener.name.clone(),
                    address: listener.address,
                    literals: listener.addresses.clone(),
                })
                .collect();
            if services.is_empty() {
                return Ok(Self(None, Refresh::default()));
            }
            let (head, labels) = (config.limits.max_head_bytes, config.admin.max_routes);
            let shows = config.shadow.enabled || !config.learn.hosts.is_empty();
            Steering::open(&config.steer, services, workers, head, labels)
                .map(|steering| steering.showing(shows, config.shadow.enabled))
                .map(|steering| Self(Some(steering), Refresh::default()))
                .map_err(io::Error::other)
        }

        /// Sockets for each worker.
        pub(in crate::cli) fn listen(&mut self) -> io::Result<Vec<Vec<(ListenerId, OwnedFd)>>> {
            self.0.as_mut().map_or(Ok(Vec::new()), |steering| steering.listen().map_err(io::Error::other))
        }

        /// What becomes of clients that are to come again.
        pub(in crate::cli) fn turn_back(&self) -> Option<TurnBack> {
            let marks = self.0.as_ref()?.marks();
            Some(Arc::new(move |address, bytes: &[u8]| {
                if let Err(error) = marks.mark(address, bytes) {
                    tracing::debug!(%error, "a client may be sent to a worker again");
                }
            }))
        }

        pub(in crate::cli) fn engage(&mut self, policies: &[PolicySpec], table: &Table) -> io::Result<()> {
            let engage = |steering: &mut Steering| steering.engage(policies, table).map_err(io::Error::other);
            self.0.as_mut().map_or(Ok(()), engage)
        }

        /// False: the self-test failed.
        pub(in crate::cli) fn is_well(&self) -> bool {
            self.0.as_ref().is_none_or(Steering::is_well)
        }

        pub(in crate::cli) fn tick(&mut self, status: &Status) {
            if let Some((policies, table)) = self.1.take_due() {
                self.set_policies(&policies, &table);
            }
            if let Some(steering) = &mut self.0 {
                tell(steering.tick());
                status.set_steer(steering.report());
            }
        }

        /// `options`: `None` if they and the policies are as before, and only what was learned is not.
        pub(in crate::cli) fn reloaded(
            &mut self,
            policies: &Arc<[PolicySpec]>,
            table: &Arc<Table>,
            options: Option<&Steer>,
        ) {
            if self.0.is_none() {
                return;
            }
            self.1.due = Some((policies.clone(), table.clone()));
            if options.is_some() {
                self.1.next = None;
            }
            if let Some((policies, table)) = self.1.take_due() {
                self.set_policies(&policies, &table);
            }
            if let (Some(steering), Some(options)) = (&mut self.0, options) {
                tell(steering.set_options(options));
            }
        }

        fn set_policies(&mut self, policies: &[PolicySpec], table: &Table) {
            if let Some(steering) = &mut self.0 {
                let start = Instant::now();
                tell(steering.set_policies(policies, table));
                self.1.next = Some(Instant::now() + start.elapsed() * SHARE);
            }
        }

        /// The preflights that the programs show; only once.
        pub(in crate::cli) fn shown(&mut self) -> crate::ask::Kernel {
            crate::ask::Kernel { inside: self.0.as_mut().and_then(Steering::shown) }
        }

        pub(in crate::cli) fn watch(&self) -> io::Result<Watching> {
            let watch = self.0.as_ref().map(|steering| Watch::new(steering.netns())).transpose();
            watch.map(Watching).map_err(io::Error::other)
        }

        pub(in crate::cli) fn changed(&mut self) {
            if let Some(steering) = &mut self.0 {
                tell(steering.changed());
            }
        }

        pub(in crate::cli) fn release(&mut self) -> bool {
            self.0.as_mut().map(Steering::release).is_some()
        }
    }

    impl Refresh {
        fn take_due(&mut self) -> Option<(Arc<[PolicySpec]>, Arc<Table>)> {
            let now = Instant::now();
            self.due.take_if(|_| self.next.is_none_or(|next| next <= now))
        }
    }

    /// Nothing is lost: without a heartbeat the programs leave everything to the proxy.
    fn tell(result: Result<(), Error>) {
        if let Err(error) = result {
            error!(%error, "steering falters");
        }
    }

    /// Tells of changed interfaces.
    pub(in crate::cli) struct Watching(Option<Watch>);

    impl Watching {
        pub(in crate::cli) async fn changed(&mut self) {
            match &mut self.0 {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(not(feature = "ebpf"))]
mod imp {
    use super::{Config, ListenerId, OwnedFd, PolicySpec, Status, Table, TurnBack, WITHOUT, io};
    use std::sync::Arc;

    /// Steering is not there.
    pub(in crate::cli) struct Steered;

    impl Steered {
        pub(in crate::cli) fn open(config: &Config, _: usize) -> io::Result<Self> {
            if config.listeners.iter().any(|listener| listener.steer) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, WITHOUT));
            }
            Ok(Self)
        }

        pub(in crate::cli) fn listen(&mut self) -> io::Result<Vec<Vec<(ListenerId, OwnedFd)>>> {
            Ok(Vec::new())
        }

        pub(in crate::cli) fn turn_back(&self) -> Option<TurnBack> {
            None
        }

        pub(in crate::cli) fn engage(&mut self, _: &[PolicySpec], _: &Table) -> io::Result<()> {
            Ok(())
        }

        pub(in crate::cli) fn is_well(&self) -> bool {
            true
        }

        pub(in crate::cli) fn tick(&mut self, _: &Status) {}

        pub(in crate::cli) fn reloaded(
            &mut self,
            _: &Arc<[PolicySpec]>,
            _: &Arc<Table>,
            _: Option<&super::Steer>,
        ) {
        }

        pub(in crate::cli) fn shown(&mut self) -> crate::ask::Kernel {
            crate::ask::Kernel::default()
        }

        pub(in crate::cli) fn watch(&self) -> io::Result<Watching> {
            Ok(Watching)
        }

        pub(in crate::cli) fn changed(&mut self) {}

        pub(in crate::cli) fn release(&mut self) -> bool {
            false
        }
    }

    pub(in crate::cli) struct Watching;

    impl Watching {
        pub(in crate::cli) async fn changed(&mut self) {
            std::future::pending().await
        }
    }
}
