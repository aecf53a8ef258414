//! Where a cluster runs: a thread, of another network namespace if need be. Its connections are opened there, and its
//! processes are that thread's children: the kernel ends them with it.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    panic,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

use crate::netns::Netns;

/// The thread and its runtime. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Place {
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Place {
    pub(super) fn new(netns: Option<&Netns>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let body = move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            tell.send(runtime.handle().clone()).expect("somebody waits for the runtime");
            // Whether it is told to end or has lost its owner.
            let _ = runtime.block_on(stopped);
        };
        let thread = match netns {
            Some(netns) => netns.spawn(body),
            None => thread::spawn(body),
        };
        let runtime = told.recv().expect("the cluster's thread");
        Self { runtime, stop: Some(stop), thread: Some(thread) }
    }

    /// Begins some work there.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Does some work there and waits for it. A panic in it is one here.
    pub(super) fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        let work = self.runtime.spawn(work);
        self.runtime.spawn(async move {
            let _ = tell.send(work.await);
        });
        match told.recv().expect("the cluster's thread") {
            Ok(value) => value,
            Err(error) => panic::resume_unwind(error.into_panic()),
        }
    }

    /// Starts a program there that writes to `log`, after what is in it already.
    pub(super) fn start(&self, program: &Path, arguments: Vec<String>, log: &Path) -> Child {
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let second = log.try_clone().expect("a second handle to the log");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(arguments);
        command.stdin(Stdio::null()).stdout(log).stderr(second);
        self.run(async move { command.spawn().unwrap_or_else(|e| panic!("starting {command:?}: {e}")) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
