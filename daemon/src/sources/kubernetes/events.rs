//! Findings as events on the objects that they are about, for who looks with `kubectl describe`.
//!
//! An event's name comes from what it says, so that of all nodes' daemons one writes it.

use super::{
    objects::{
        Gateway, GatewayClass, GlooTrafficPolicy, GrpcRoute, HttpRoute, Ingress, IngressClass, Kind,
        ListenerSet, Namespace, ReferenceGrant, TrafficPolicy, XListenerSet, for_each_kind,
    },
    resolve::Noted,
};
use ahash::AHashSet;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::debug;

/// Between two events, and how many may wait.
const PAUSE: Duration = Duration::from_millis(100);
const WAITING: usize = 1000;
/// How long a text the API takes (`events.k8s.io/v1`, `note`).
const MAX_NOTE: usize = 1024;

/// Writes events, slowly.
#[derive(Debug)]
pub(super) struct Teller {
    wanted: mpsc::Sender<(String, Noted)>,
    told: AHashSet<String>,
}

impl Teller {
    /// Begins. Belongs to the tokio runtime that it is called in.
    pub(super) fn start(client: Client) -> Self {
        let (sender, mut wanted) = mpsc::channel::<(String, Noted)>(WAITING);
        tokio::spawn(async move {
            while let Some((name, noted)) = wanted.recv().await {
                let namespace = match &*noted.object.key.namespace {
                    "" => "default",
                    namespace => namespace,
                };
                let api: Api<Event> = Api::namespaced(client.clone(), namespace);
                match api.create(&PostParams::default(), &event(&noted, name, namespace)).await {
                    Ok(_) => {}
                    // Another node's daemon has written it.
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    Err(error) => debug!(object = %noted.object, "cannot write an event: {error}"),
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { wanted: sender, told: AHashSet::new() }
    }

    /// Writes those of the findings that were not written yet; false: some do not fit now, and should be told again.
    pub(super) fn tell(&mut self, findings: &[Noted]) -> bool {
        if self.told.len() > 100 * WAITING {
            self.told.clear();
        }
        for noted in findings.iter().filter(|noted| !noted.uid.is_empty()) {
            let name = name(noted);
            if self.told.contains(&name) {
                continue;
            }
            if self.wanted.try_send((name.clone(), noted.clone())).is_err() {
                return false;
            }
            self.told.insert(name);
        }
        true
    }
}

/// The same on every node.
fn name(noted: &Noted) -> String {
    let said = (&noted.uid, &noted.field, noted.code, &noted.message);
    let hash = ahash::RandomState::with_seeds(0x7072_6566, 0x6c69_6768, 0x7464, 1).hash_one(said);
    let mut object: String = noted.object.key.name.chars().take(200).collect();
    object.truncate(object.trim_end_matches(['-', '.']).len());
    format!("{object}.{hash:016x}")
}

fn event(noted: &Noted, name: String, namespace: &str) -> Event {
    let mut note = format!("{}: {} {}", noted.field, noted.message, noted.help);
    if note.len() > MAX_NOTE {
        let end = (0..=MAX_NOTE - 3).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0);
        note.truncate(end);
        note.push_str("...");
    }
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        action: Some("Checked".to_owned()),
        event_time: Some(MicroTime(Timestamp::now())),
        note: Some(note),
        reason: Some(reason(noted.code)),
        regarding: Some(ObjectReference {
            api_version: api_version(noted.object.kind),
            kind: Some(noted.object.kind.to_owned()),
            name: Some(noted.object.key.name.to_string()),
            namespace: (!noted.object.key.namespace.is_empty())
                .then(|| noted.object.key.namespace.to_string()),
            uid: Some(noted.uid.to_string()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some("preflightd.io/daemon".to_owned()),
        reporting_instance: Some("preflightd".to_owned()),
        type_: Some("Warning".to_owned()),
        ..Event::default()
    }
}

/// `origin-trailing-slash` as events have it.
fn reason(code: &str) -> String {
    code.split('-').map(|word| word[..1].to_ascii_uppercase() + &word[1..]).collect()
}

fn api_version(kind: &str) -> Option<String> {
    macro_rules! of {
        ($name:ident) => {
            if kind == $name::KIND {
                let (group, version) = ($name::GROUP, $name::VERSION);
                return Some(if group.is_empty() {
                    version.to_owned()
                } else {
                    format!("{group}/{version}")
                });
            }
        };
    }
    for_each_kind!(of);
    None
}
