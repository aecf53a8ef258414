//! What `/metrics` shows (Prometheus text format 0.0.4).
//!
//! Nothing is counted here: a scrape adds up the workers' cells and sets the registry to the sums.

use super::{LATENCY_BUCKETS_US, ReloadResult, Status};
use crate::sources::kubernetes::State;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::{Mutex, PoisonError, atomic::Ordering},
};

/// The registry; a process may have several.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// Scrapes one after the other: a later one must not show less than an earlier one.
    scrape: Mutex<()>,
    /// Kinds of findings that were shown.
    findings: Mutex<Findings>,
}

/// Source, severity and code.
type Findings = HashSet<(&'static str, &'static str, &'static str)>;

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty registry.
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, describe);
        Self { recorder, handle, scrape: Mutex::new(()), findings: Mutex::default() }
    }

    /// The exposition.
    pub fn render(&self, status: &Status) -> String {
        let _one = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        metrics::with_local_recorder(&self.recorder, || {
            requests(status);
            connections(status);
            relay(status);
            process(status);
            findings(status, &self.findings);
            if let Some(state) = status.kubernetes() {
                kubernetes(&state);
            }
            asked(status);
            #[cfg(feature = "ebpf")]
            steer(status);
        });
        let mut text = self.handle.render();
        latency(status, &mut text);
        text
    }
}

fn describe() {
    describe_counter!(
        "preflightd_requests_total",
        "Requests that reached the policies, by route, what became of them, and which tier decided: `worker` or `kernel`. \
         Routes beyond admin.max_routes share the series with empty host, route and policy, as do requests without a \
         route."
    );
    describe_counter!("preflightd_connections_accepted_total", "Connections accepted by workers.");
    describe_gauge!("preflightd_connections_open", "Connections that workers own now.");
    describe_counter!(
        "preflightd_connections_closed_total",
        "Connections that ended with a worker, by cause. `done`: ended by the client or after an answer."
    );
    describe_counter!(
        "preflightd_connections_handed_over_total",
        "Connections that workers handed to the relay."
    );
    describe_counter!(
        "preflightd_connections_capped_total",
        "Times that a worker closed an idle connection or paused accepting at limits.max_connections."
    );
    describe_counter!(
        "preflightd_accept_errors_total",
        "Errors of accept, such as too few file descriptors."
    );
    describe_counter!(
        "preflightd_error_responses_total",
        "Responses with a status of 400 or above of our own making."
    );
    describe_counter!("preflightd_relay_connections_total", "Connections that the relay took over.");
    describe_gauge!("preflightd_relay_connections_open", "Connections that the relay owns now.");
    describe_counter!(
        "preflightd_relay_bytes_total",
        "Bytes relayed. `up`: from client to upstream; `down`: back."
    );
    describe_counter!(
        "preflightd_relay_failures_total",
        "Relayed connections that ended badly, by cause. `upstream`: refused, unreachable or too slow to connect, a \
         502 each; `overloaded`: more than relay.max_connections, a 503 each; `aborted`: a reset or an I/O error \
         later; `idle`: relay.idle_timeout."
    );
    describe_counter!(
        "preflightd_ask_sampled_total",
        "Preflights that were shown to the thread that asks the proxy."
    );
    describe_counter!(
        "preflightd_ask_dropped_total",
        "Preflights that the proxy might have been asked about, and for which there was no room."
    );
    describe_counter!(
        "preflightd_asks_total",
        "Questions to the proxy, by result: `answered`, or `failed` (it could not be reached, or did not answer in time or \
         in HTTP/1)."
    );
    describe_gauge!(
        "preflightd_learned_entries",
        "Questions that are remembered: `known` with an answer that holds, `asked`, and `refused` without one that may be \
         used."
    );
    describe_gauge!("preflightd_learned_entries_limit", "How many of them fit.");
    describe_counter!(
        "preflightd_learned_total",
        "What became of answers of the proxy: `learned`, or why not. `conflict`: two asks had different answers."
    );
    describe_counter!(
        "preflightd_learned_evicted_total",
        "Entries that had to give way to others: too many at once."
    );
    describe_counter!(
        "preflightd_shadow_compared_total",
        "Comparisons of our answers with the proxy's, as a browser judges them, by route and result. One with several \
         differences counts under each. `we_pass` and `ask_failed`: there was nothing to compare."
    );
    #[cfg(feature = "ebpf")]
    describe_steer();
    describe_gauge!("preflightd_table_generation", "Generation of the newest policy table.");
    describe_gauge!(
        "preflightd_worker_table_generation",
        "Generation of the policy table that each worker answers by."
    );
    describe_counter!("preflightd_reloads_total", "Reloads of the policies, by result.");
    describe_gauge!(
        "preflightd_policies_current",
        "1: the policies that run are those of the files. 0: the last reload was refused."
    );
    describe_gauge!(
        "preflightd_policy_findings",
        "What is wrong or doubtful in the policies that run, by severity and code; `source` is `files` or `kubernetes`."
    );
    describe_gauge!("preflightd_kubernetes_objects", "Objects of Kubernetes that are known, by kind.");
    describe_gauge!(
        "preflightd_kubernetes_policies",
        "Policies that objects came down to. `answer`: answered here; `pass`: left to the proxy."
    );
    describe_gauge!("preflightd_kubernetes_synced", "1: all objects have been listed.");
    describe_gauge!(
        "preflightd_kubernetes_stale",
        "1: the API server could not be asked for longer than kubernetes.stale_after, and policies from it pass."
    );
    describe_gauge!(
        "preflightd_kubernetes_age_seconds",
        "Time since the API server answered and every watch was well; a few seconds are usual."
    );
    describe_counter!("preflightd_kubernetes_failures_total", "Lists and watches that failed, by kind.");
    describe_gauge!(
        "preflightd_kubernetes_resolve_seconds",
        "How long all objects took to be resolved, the last time."
    );
    describe_gauge!("preflightd_ready", "1: every worker answers, and it does not shut down.");
    describe_gauge!("preflightd_start_time_seconds", "When it was started, in seconds since 1970.");
    describe_gauge!("preflightd_build_info", "Its version.");
    describe_gauge!("preflightd_engine_info", "What drives the workers' sockets and the relay.");
}

/// Of policies that run; a code that is not found any more goes back to 0.
fn findings(status: &Status, told: &Mutex<Findings>) {
    let mut sums: HashMap<_, u32> = HashMap::new();
    for finding in status.running().findings.iter() {
        *sums.entry(("files", finding.severity.as_str(), finding.code)).or_default() += 1;
    }
    for finding in status.kubernetes().iter().flat_map(|state| state.findings.iter()) {
        *sums.entry(("kubernetes", finding.severity.as_str(), finding.code)).or_default() += 1;
    }
    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
    for known in told.iter() {
        sums.entry(*known).or_default();
    }
    for ((source, severity, code), count) in sums {
        told.insert((source, severity, code));
        gauge!("preflightd_policy_findings", "source" => source, "severity" => severity, "code" => code)
            .set(f64::from(count));
    }
}

fn kubernetes(state: &State) {
    #[expect(clippy::cast_precision_loss, reason = "a count")]
    let number = |count: usize| count as f64;
    for (kind, count) in &state.objects {
        gauge!("preflightd_kubernetes_objects", "kind" => *kind).set(number(*count));
    }
    let passing = state.policies.iter().filter(|policy| policy.spec.passes.is_some()).count();
    for (what, count) in [("pass", passing), ("answer", state.policies.len() - passing)] {
        gauge!("preflightd_kubernetes_policies", "what" => what).set(number(count));
    }
    gauge!("preflightd_kubernetes_synced").set(f64::from(u8::from(state.synced)));
    gauge!("preflightd_kubernetes_stale").set(f64::from(u8::from(state.stale)));
    if let Some(age) = state.age() {
        gauge!("preflightd_kubernetes_age_seconds").set(age.as_secs_f64());
    }
    for (kind, count) in &state.failures {
        counter!("preflightd_kubernetes_failures_total", "kind" => *kind).absolute(*count);
    }
    gauge!("preflightd_kubernetes_resolve_seconds").set(state.resolving.as_secs_f64());
}

fn requests(status: &Status) {
    let mut sums: HashMap<_, u64> = HashMap::new();
    for worker in &status.workers {
        for (route, outcome, reason, count) in worker.requests() {
            *sums.entry((route, outcome, reason, "worker")).or_default() += count;
        }
    }
    #[cfg(feature = "ebpf")]
    if let Some(report) = status.steer() {
        for (route, row) in (0..).zip(&report.kernel.outcomes) {
            for (slot, count) in (0..).zip(row).filter(|(_, count)| **count > 0) {
                let (outcome, reason) = decided(slot);
                *sums.entry((crate::policy::RouteId(route), outcome, reason, "kernel")).or_default() += count;
            }
        }
    }
    let labels = status.running().labels.clone();
    for ((route, outcome, reason, tier), count) in sums {
        // Numbers are never reused, so a route without a label is one of a table that is not public yet.
        let Some(label) = labels.get(route.0 as usize) else { continue };
        counter!(
            "preflightd_requests_total",
            "host" => label.host.to_string(),
            "route" => label.route.to_string(),
            "policy" => label.policy.to_string(),
            "outcome" => outcome,
            "reason" => reason,
            "tier" => tier,
        )
        .absolute(count);
    }
}

/// What the kernel decided, in the workers' words.
#[cfg(feature = "ebpf")]
fn decided(slot: u32) -> (&'static str, &'static str) {
    use crate::{reason::PassReason, steer::outcome};
    match slot {
        outcome::Allowed => ("allowed", ""),
        outcome::DeniedOrigin => ("denied", "origin"),
        outcome::DeniedMethod => ("denied", "method"),
        outcome::DeniedHeaders => ("denied", "headers"),
        outcome::PassedOrigin => ("passed", PassReason::OriginNotAllowed.as_str()),
        outcome::PassedMethod => ("passed", PassReason::MethodNotAllowed.as_str()),
        outcome::PassedHeaders => ("passed", PassReason::HeadersNotAllowed.as_str()),
        _ => ("passed", PassReason::NoRoute.as_str()),
    }
}

fn connections(status: &Status) {
    let sum = |cell: fn(&super::WorkerStats) -> &super::Cell| -> u64 {
        status.workers.iter().map(|worker| cell(worker).get()).sum()
    };
    // Read in this order: what is accepted in the meantime only makes the number of open ones too small by it.
    let accepted = sum(|w| &w.accepted);
    let closed = sum(|w| &w.closed);
    let handed_over = sum(|w| &w.handed_over);
    counter!("preflightd_connections_accepted_total").absolute(accepted);
    gauge!("preflightd_connections_open").set(number(accepted.saturating_sub(closed + handed_over)));
    let header_timeouts = sum(|w| &w.header_timeouts);
    let idle_timeouts = sum(|w| &w.idle_timeouts);
    let send_timeouts = sum(|w| &w.send_timeouts);
    let done = closed.saturating_sub(header_timeouts + idle_timeouts + send_timeouts);
    for (cause, count) in [
        ("header_timeout", header_timeouts),
        ("idle_timeout", idle_timeouts),
        ("send_timeout", send_timeouts),
        ("done", done),
    ] {
        counter!("preflightd_connections_closed_total", "cause" => cause).absolute(count);
    }
    counter!("preflightd_connections_handed_over_total").absolute(handed_over);
    counter!("preflightd_connections_capped_total").absolute(sum(|w| &w.capped));
    counter!("preflightd_accept_errors_total").absolute(sum(|w| &w.accept_errors));
    counter!("preflightd_error_responses_total").absolute(sum(|w| &w.error_responses));
}

fn relay(status: &Status) {
    let relay = &status.relay;
    let get = |cell: &std::sync::atomic::AtomicU64| cell.load(Ordering::Relaxed);
    counter!("preflightd_relay_connections_total").absolute(get(&relay.connections));
    gauge!("preflightd_relay_connections_open").set(number(get(&relay.open)));
    counter!("preflightd_relay_bytes_total", "direction" => "up").absolute(get(&relay.bytes_up));
    counter!("preflightd_relay_bytes_total", "direction" => "down").absolute(get(&relay.bytes_down));
    for (cause, count) in [
        ("upstream", &relay.upstream_errors),
        ("overloaded", &relay.overloaded),
        ("aborted", &relay.aborted),
        ("idle", &relay.idle_timeouts),
    ] {
        counter!("preflightd_relay_failures_total", "cause" => cause).absolute(get(count));
    }
}

fn process(status: &Status) {
    let flag = |on: bool| f64::from(u8::from(on));
    {
        let running = status.running();
        gauge!("preflightd_table_generation").set(number(running.table.generation()));
        for (worker, generation) in running.generations.iter().enumerate() {
            gauge!("preflightd_worker_table_generation", "worker" => worker.to_string())
                .set(number(*generation));
        }
        for result in ReloadResult::ALL {
            counter!("preflightd_reloads_total", "result" => result.as_str())
                .absolute(running.reloads[result as usize]);
        }
        gauge!("preflightd_policies_current").set(flag(running.current));
    }
    gauge!("preflightd_ready").set(flag(status.is_ready()));
    let started = status.started.0.duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    gauge!("preflightd_start_time_seconds").set(started);
    gauge!("preflightd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(
        "preflightd_engine_info",
        "workers" => status.engine.clone(),
        "relay" => status.relay_backend.clone()
    )
    .set(1.0);
}

fn asked(status: &Status) {
    let Some(ask) = status.ask() else { return };
    let get = |cell: &std::sync::atomic::AtomicU64| cell.load(Ordering::Relaxed);
    counter!("preflightd_ask_sampled_total").absolute(get(&ask.counters.sampled));
    counter!("preflightd_ask_dropped_total").absolute(get(&ask.counters.dropped));
    counter!("preflightd_asks_total", "result" => "answered").absolute(get(&ask.counters.answered));
    counter!("preflightd_asks_total", "result" => "failed").absolute(get(&ask.counters.failed));
    if let Some(store) = ask.store() {
        let crate::ask::Sizes { known, asked, refused } = store.sizes();
        for (state, count) in [("known", known), ("asked", asked), ("refused", refused)] {
            gauge!("preflightd_learned_entries", "state" => state).set(number(count as u64));
        }
        gauge!("preflightd_learned_entries_limit").set(number(status.config.learn.max_entries as u64));
        let (learned, evicted) = store.totals();
        counter!("preflightd_learned_total", "result" => "learned").absolute(learned);
        for (result, count) in store.refusals() {
            counter!("preflightd_learned_total", "result" => result).absolute(count);
        }
        counter!("preflightd_learned_evicted_total").absolute(evicted);
    }
    let labels = status.running().labels.clone();
    if let Some(shadow) = ask.shadow() {
        for (route, result, count) in shadow.counts() {
            let Some(label) = labels.get(route.0 as usize) else { continue };
            counter!(
                "preflightd_shadow_compared_total",
                "host" => label.host.to_string(),
                "route" => label.route.to_string(),
                "policy" => label.policy.to_string(),
                "result" => result.as_str(),
            )
            .absolute(count);
        }
    }
}

#[cfg(feature = "ebpf")]
fn describe_steer() {
    describe_gauge!(
        "preflightd_steer_state",
        "1 for what the eBPF programs do at present: `off`, `observing` (connections are counted, nothing is touched), \
         `steering` (handshakes are deferred), `replaced` (another daemon has them)."
    );
    describe_counter!(
        "preflightd_steer_port_flows_total",
        "New connections to a steered port by what they open with. `syn`: all that were seen; `silent`: ended without a \
         byte; `pooled_options`: OPTIONS later on a connection, seen while observing only."
    );
    describe_counter!(
        "preflightd_steer_flows_total",
        "Deferred connections by who got their first request: `kernel`, `worker` or `proxy`."
    );
    describe_counter!(
        "preflightd_steer_fail_open_total",
        "New connections that were left to the kernel's own handshake, by reason."
    );
    describe_counter!("preflightd_steer_events_total", "What the eBPF programs did, each branch of its own.");
    describe_counter!("preflightd_steer_packets_total", "Packets to steered ports that the programs saw.");
    describe_gauge!(
        "preflightd_steer_packet_seconds",
        "What a packet to a steered port takes in the program on average, estimated from one in 64 on each CPU."
    );
    describe_gauge!(
        "preflightd_steer_answer_seconds",
        "What a packet that the program answers takes in it on average, of those that are timed."
    );
    describe_counter!(
        "preflightd_steer_asked_total",
        "Preflights, and what began like some, that the kernel did not answer itself, by reason."
    );
    describe_gauge!("preflightd_steer_kernel_answers", "1: the kernel answers what it can decide.");
    describe_gauge!(
        "preflightd_steer_answered",
        "Connections that the kernel has answered on and that are nobody else's yet, about."
    );
    describe_gauge!("preflightd_steer_answered_limit", "How many of them fit.");
    describe_gauge!(
        "preflightd_steer_pending",
        "Connections between their SYN and their first data, as of the last sweep (10 s)."
    );
    describe_gauge!("preflightd_steer_pending_limit", "How many of them fit.");
    describe_gauge!(
        "preflightd_steer_port_disengaged",
        "1: connections to the port are not deferred for a while, for they were not plain HTTP; the status says why."
    );
    describe_gauge!("preflightd_steer_interface", "1 for each interface that has the program.");
    describe_counter!(
        "preflightd_steer_turned_back_total",
        "Connections that a worker could not answer and told to come again (421): the next attempt goes to the proxy."
    );
}

#[cfg(feature = "ebpf")]
fn steer(status: &Status) {
    use crate::steer::{State, ask, event, fail_open, kind};

    let Some(report) = status.steer() else { return };
    for state in State::ALL {
        let on = f64::from(u8::from(state == report.state));
        gauge!("preflightd_steer_state", "state" => state.as_str()).set(on);
    }
    let counts = &report.counts;
    for port in &report.ports {
        let label = port.port.to_string();
        for (slot, name) in (0..).zip(kind::NAMES) {
            let count = counts.port(port.row, slot);
            if matches!(slot, kind::Kernel | kind::Worker | kind::Proxy) {
                counter!("preflightd_steer_flows_total", "port" => label.clone(), "to" => *name)
                    .absolute(count);
            } else {
                counter!("preflightd_steer_port_flows_total", "port" => label.clone(), "kind" => *name)
                    .absolute(count);
            }
        }
        let off = f64::from(u8::from(port.disengaged.is_some()));
        gauge!("preflightd_steer_port_disengaged", "port" => label).set(off);
    }
    for (count, name) in counts.fail_opens.iter().zip(fail_open::NAMES) {
        counter!("preflightd_steer_fail_open_total", "reason" => *name).absolute(*count);
    }
    for (slot, name) in (0..).zip(event::NAMES) {
        const OTHERWISE: [u32; 5] =
            [event::Packet, event::SampledNs, event::Sampled, event::AnswerNs, event::AnswerSampled];
        if !OTHERWISE.contains(&slot) {
            counter!("preflightd_steer_events_total", "event" => *name).absolute(counts.event(slot));
        }
    }
    counter!("preflightd_steer_packets_total").absolute(counts.event(event::Packet));
    let sampled = number(counts.event(event::Sampled)).max(1.0);
    let each = number(counts.event(event::SampledNs)) / sampled;
    gauge!("preflightd_steer_packet_seconds").set(each / 1e9);
    let sampled = number(counts.event(event::AnswerSampled)).max(1.0);
    let each = number(counts.event(event::AnswerNs)) / sampled;
    gauge!("preflightd_steer_answer_seconds").set(each / 1e9);
    for (slot, (name, count)) in (0..).zip(ask::NAMES.iter().zip(&counts.asked)) {
        if slot != ask::Nothing {
            counter!("preflightd_steer_asked_total", "reason" => *name).absolute(*count);
        }
    }
    gauge!("preflightd_steer_kernel_answers").set(f64::from(u8::from(report.kernel.on)));
    gauge!("preflightd_steer_answered").set(number(report.kernel.answered));
    gauge!("preflightd_steer_answered_limit").set(f64::from(report.kernel.max_answered));
    gauge!("preflightd_steer_pending").set(number(report.pending));
    gauge!("preflightd_steer_pending_limit").set(f64::from(report.max_pending));
    for interface in &report.interfaces {
        gauge!("preflightd_steer_interface", "interface" => interface.clone()).set(1.0);
    }
    counter!("preflightd_steer_turned_back_total").absolute(status.relay.turned_back.load(Ordering::Relaxed));
}

/// The exporter takes single values only, and ours are in buckets already: the histogram is written by hand.
fn latency(status: &Status, text: &mut String) {
    const NAME: &str = "preflightd_answer_duration_seconds";
    let mut buckets = [0_u64; LATENCY_BUCKETS_US.len() + 1];
    let mut nanoseconds = 0_u64;
    for worker in &status.workers {
        let (counts, sum) = worker.latencies();
        for (bucket, count) in buckets.iter_mut().zip(counts) {
            *bucket += count;
        }
        nanoseconds = nanoseconds.wrapping_add(sum);
    }
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# HELP {NAME} From a complete request head to the kernel's taking the answer.\n# TYPE {NAME} histogram"
    );
    let mut count = 0;
    for (bucket, bound) in buckets.iter().zip(LATENCY_BUCKETS_US) {
        count += bucket;
        let _ = writeln!(text, "{NAME}_bucket{{le=\"{}\"}} {count}", number(*bound) / 1e6);
    }
    count += buckets[LATENCY_BUCKETS_US.len()];
    let _ = writeln!(text, "{NAME}_bucket{{le=\"+Inf\"}} {count}");
    let _ = writeln!(text, "{NAME}_sum {}", number(nanoseconds) / 1e9);
    let _ = writeln!(text, "{NAME}_count {count}");
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53; beyond, Prometheus has no better number either"
)]
fn number(n: u64) -> f64 {
    n as f64
}
