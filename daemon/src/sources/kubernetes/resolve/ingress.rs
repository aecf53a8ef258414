//! Ingresses, as ingress-nginx serves them: each with rules of its own, over all of its paths.
//!
//! Source: ingress-nginx, `internal/ingress/controller/controller.go` (servers and locations),
//! `internal/ingress/controller/location.go` (path types), `rootfs/etc/nginx/template/nginx.tmpl`.

use super::{
    Cors, ObjectName, Outcome, Run, always_passes,
    claims::{Claim, broader},
    element_prefix, host_pattern,
    kgateway::escaped,
    name_of,
};
use crate::{
    policy::{HostPattern, ListenerId, PathMatch, Severity, dialect::ingress_nginx},
    reason::PassReason,
    sources::kubernetes::objects::{Ingress, IngressClass, Key, Kind as _, Object},
};
use ahash::AHashSet;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

const PREFIX: &str = "nginx.ingress.kubernetes.io/";
const CONTROLLER: &str = "k8s.io/ingress-nginx";
/// Annotations that let something answer before CORS does, or that change answers.
const UNMODELLED: &[&str] = &[
    "configuration-snippet",
    "custom-headers",
    "enable-modsecurity",
    "from-to-www-redirect",
    "permanent-redirect",
    "temporal-redirect",
];

/// Annotations of one Ingress that hold for the whole host.
const OF_SERVER: &[&str] = &["app-root", "server-snippet"];

/// As Go's `strconv.ParseBool`.
fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

/// A location of a server.
struct Location<'w> {
    ingress: &'w Object<Ingress>,
    path: String,
    kind: &'w str,
    outcome: Outcome,
}

/// A server of nginx: one host of one class.
#[derive(Default)]
struct Server<'w> {
    locations: Vec<Location<'w>>,
    /// All of its locations are regular expressions, for an Ingress of it wants that.
    regex: Option<&'w Object<Ingress>>,
    /// An Ingress says something about the host as a whole that may answer first.
    taken: Option<&'w Object<Ingress>>,
    /// A name that an Ingress only adds.
    alias: Option<&'w Object<Ingress>>,
    /// The same, of names that are patterns.
    patterns: Option<&'w Object<Ingress>>,
}

impl Run<'_> {
    pub(super) fn ingresses(&mut self) {
        let world = self.world;
        let mut ingresses: Vec<&Arc<Object<Ingress>>> = world.ingresses.values().collect();
        // What is older is first, and what is first has its path.
        ingresses.sort_by(|a, b| {
            let name = |ingress: &Object<Ingress>| ingress.key().to_string();
            a.meta.creation_timestamp.cmp(&b.meta.creation_timestamp).then_with(|| name(b).cmp(&name(a)))
        });
        let secured = self.secured();
        // One controller has all of its classes in one nginx, unless they are told apart.
        let mut controllers: BTreeMap<Vec<ListenerId>, BTreeMap<HostPattern, Server<'_>>> = BTreeMap::new();
        for ingress in ingresses {
            let Some((class, certain)) = self.class_of(ingress) else { continue };
            let Some(listeners) = self.listeners(|scope| scope.ingress_classes.contains(&class)) else {
                continue;
            };
            self.ingress(ingress, certain, &secured, controllers.entry(listeners).or_default());
        }
        for (listeners, servers) in &controllers {
            let proxy = self.claims.proxy("ingress-nginx".to_owned(), listeners);
            // A name that is a regular expression, or a pattern of nginx's own, goes before wildcards.
            let patterns = servers.values().find_map(|server| server.patterns);
            for (host, server) in servers {
                let odd = patterns.filter(|_| !matches!(host, HostPattern::Exact(_)));
                self.server(host, server, proxy, odd);
            }
        }
    }

    /// Hosts for which nginx has a certificate, and so redirects plain requests.
    fn secured(&self) -> AHashSet<HostPattern> {
        let mut hosts = AHashSet::new();
        for ingress in self.world.ingresses.values() {
            for tls in &ingress.spec.tls {
                hosts.extend(tls.hosts.iter().filter_map(|host| host_pattern(host)));
                if tls.hosts.is_empty() {
                    let rules = ingress.spec.rules.iter();
                    hosts.extend(rules.filter_map(|rule| host_pattern(rule.host.as_deref().unwrap_or(""))));
                }
            }
        }
        hosts
    }

    /// The class of an Ingress, if it is one of ingress-nginx that concerns us; and whether it is certain that the controller
    /// has it: what names no class, or only by the old annotation, it has or not by its own settings.
    fn class_of(&self, ingress: &Object<Ingress>) -> Option<(String, bool)> {
        let legacy = ingress.meta.annotations.get("kubernetes.io/ingress.class");
        let is_default = |class: &Object<IngressClass>| {
            let annotation = class.meta.annotations.get("ingressclass.kubernetes.io/is-default-class");
            annotation.is_some_and(|value| value == "true")
        };
        let assume = self.settings.assume.is_some();
        let classes = &self.world.ingress_classes;
        let (name, certain) = match (&ingress.spec.ingress_class_name, legacy) {
            (Some(name), _) => (name.clone(), true),
            (None, Some(name)) => (name.clone(), name == "nginx"),
            (None, None) => match classes.values().find(|class| is_default(class)) {
                // The API server writes it into what is created.
                Some(class) => (class.meta.name.clone(), assume),
                None => ("nginx".to_owned(), assume),
            },
        };
        let wanted = &self.settings.ingress_classes;
        if !wanted.is_empty() {
            return wanted.contains(&name).then_some((name, certain || legacy.is_some()));
        }
        let ours = match classes.get(&Key::new("", &name)) {
            Some(class) => class.spec.controller == CONTROLLER,
            // Named as controllers have it by default, by an annotation or in manifests without classes.
            None => name == "nginx" && (legacy.is_some() || assume),
        };
        ours.then_some((name, certain))
    }

    fn ingress<'w>(
        &mut self,
        ingress: &'w Object<Ingress>,
        certain: bool,
        secured: &AHashSet<HostPattern>,
        servers: &mut BTreeMap<HostPattern, Server<'w>>,
    ) {
        let object = name_of::<Ingress>(&ingress.meta);
        let annotation = |name: &str| ingress.meta.annotations.get(&format!("{PREFIX}{name}"));
        if annotation("canary").is_some_and(|value| is_true(value)) {
            // Only another backend of locations that are there.
            return;
        }
        let of_all =
            if certain { self.outcome_of(&object, ingress) } else { Outcome::Pass(PassReason::Unsupported) };
        let taken = OF_SERVER.iter().any(|name| annotation(name).is_some());
        let regex = annotation("use-regex").is_some_and(|value| is_true(value))
            || annotation("rewrite-target").is_some_and(|target| {
                // `/` has the annotation as well, whatever is said of it.
                target != "/"
                    || ingress
                        .spec
                        .rules
                        .iter()
                        .flat_map(|rule| &rule.http.paths)
                        .any(|p| p.path.as_ref() != Some(target))
            });
        let mut hosts = Vec::new();
        for (i, rule) in ingress.spec.rules.iter().enumerate() {
            let Some(host) = host_pattern(rule.host.as_deref().unwrap_or("")) else {
                self.note(
                    &object,
                    &ingress.meta,
                    format!("spec.rules[{i}].host"),
                    (Severity::Error, "host-invalid"),
                    format!("`{}` is no host name", rule.host.as_deref().unwrap_or("").escape_debug()),
                    "Write a name such as `api.example.com` or `*.example.com`.",
                );
                continue;
            };
            let server = servers.entry(host.clone()).or_default();
            if regex {
                server.regex.get_or_insert(ingress);
            }
            if taken {
                server.taken.get_or_insert(ingress);
            }
            let outcome = match of_all {
                Outcome::Answer(_) if self.redirects(&object, ingress, &host, secured) => {
                    Outcome::Pass(PassReason::Unsupported)
                }
                outcome => outcome,
            };
            for path in &rule.http.paths {
                let text = path.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
                let kind = path.path_type.as_deref().unwrap_or("ImplementationSpecific");
                if !server.locations.iter().any(|l| l.path == text && l.kind == kind) {
                    server.locations.push(Location { ingress, path: text.to_owned(), kind, outcome });
                }
            }
            hosts.push(host);
        }
        if ingress.spec.rules.is_empty() && ingress.spec.default_backend {
            let server = servers.entry(HostPattern::Any).or_default();
            if !server.locations.iter().any(|l| l.path == "/") {
                server.locations.push(Location {
                    ingress,
                    path: "/".to_owned(),
                    kind: "Prefix",
                    outcome: of_all,
                });
            }
        }
        // Names that it is served under besides; which of several servers has them is nginx's to say.
        let mut others: Vec<String> = Vec::new();
        if annotation("from-to-www-redirect").is_some_and(|value| is_true(value)) {
            let names = ingress.spec.rules.iter().filter_map(|rule| rule.host.as_deref());
            others.extend(names.map(|name| {
                name.strip_prefix("www.").map_or_else(|| format!("www.{name}"), ToOwned::to_owned)
            }));
        }
        let aliases = annotation("server-alias").map_or("", String::as_str);
        others.extend(
            aliases.split(',').map(|alias| alias.trim().to_owned()).filter(|alias| !alias.is_empty()),
        );
        for name in others {
            match host_pattern(&name) {
                Some(host @ HostPattern::Exact(_)) => {
                    servers.entry(host).or_default().alias.get_or_insert(ingress);
                }
                _ => {
                    servers.entry(HostPattern::Any).or_default().patterns.get_or_insert(ingress);
                }
            }
        }
    }

    /// Whether nginx redirects plain requests of a host to HTTPS before anything else.
    fn redirects(
        &mut self,
        object: &ObjectName,
        ingress: &Object<Ingress>,
        host: &HostPattern,
        secured: &AHashSet<HostPattern>,
    ) -> bool {
        let annotation = |name: &str| ingress.meta.annotations.get(&format!("{PREFIX}{name}"));
        let forced = annotation("force-ssl-redirect").is_some_and(|value| is_true(value));
        // What it does not understand counts as unset, which is true.
        let off = annotation("ssl-redirect")
            .is_some_and(|value| matches!(&**value, "0" | "f" | "F" | "false" | "FALSE" | "False"));
        let by_certificate = || {
            secured.contains(host)
                || broader(host).iter().any(|wider| *wider != HostPattern::Any && secured.contains(wider))
        };
        if !forced && (off || !by_certificate()) {
            return false;
        }
        let field = if forced {
            "metadata.annotations[nginx.ingress.kubernetes.io/force-ssl-redirect]"
        } else {
            "spec.rules"
        };
        self.note(
            object,
            &ingress.meta,
            field,
            (Severity::Warning, "redirects-to-https"),
            format!(
                "nginx redirects plain HTTP of {host} to HTTPS, so its preflights on plain ports go to the proxy"
            ),
            "Nothing if clients come by TLS; where TLS ends before the proxy, set \
             `nginx.ingress.kubernetes.io/ssl-redirect: \"false\"`.",
        );
        true
    }

    /// What becomes of preflights to an Ingress.
    fn outcome_of(&mut self, object: &ObjectName, ingress: &Object<Ingress>) -> Outcome {
        if !self.is_selected(&ingress.meta) {
            return Outcome::Pass(PassReason::Disabled);
        }
        let annotations: ingress_nginx::Annotations = ingress
            .meta
            .annotations
            .iter()
            .filter_map(|(name, value)| {
                let name = name.strip_prefix(PREFIX)?;
                (name == "enable-cors" || name.starts_with("cors-")).then(|| (name.to_owned(), value.clone()))
            })
            .collect();
        if annotations.get("enable-cors").is_none_or(|on| !is_true(on)) {
            return Outcome::Pass(PassReason::NoCors);
        }
        let (_, found) = ingress_nginx::validate(&annotations);
        self.note_annotations(object, ingress, found);
        let annotation = |name: &str| ingress.meta.annotations.get(&format!("{PREFIX}{name}"));
        if annotations
            .get("enable-cors")
            .is_none_or(|on| !matches!(on.trim(), "1" | "t" | "T" | "true" | "TRUE" | "True"))
        {
            return Outcome::Pass(PassReason::NoCors);
        }
        if let Some(name) =
            UNMODELLED.iter().find(|name| annotation(name).is_some_and(|value| value != "false"))
        {
            self.note(
                object,
                &ingress.meta,
                format!("metadata.annotations[{PREFIX}{name}]"),
                (Severity::Warning, "annotation-unmodelled"),
                format!("`{name}` may change what nginx answers to a preflight, so those of this Ingress go to the proxy"),
                "Nothing; or leave it out of Ingresses whose preflights should be answered here.",
            );
            return Outcome::Pass(PassReason::Unsupported);
        }
        Outcome::Answer(self.resolver.rules(Cors::IngressNginx(annotations)))
    }

    fn note_annotations(
        &mut self,
        object: &ObjectName,
        ingress: &Object<Ingress>,
        found: Vec<crate::policy::Finding>,
    ) {
        for finding in found {
            let item = finding.item.map(|item| format!(" (entry {})", item + 1)).unwrap_or_default();
            let field = format!("metadata.annotations[{PREFIX}{}]{item}", finding.field);
            self.note(
                object,
                &ingress.meta,
                field,
                (finding.severity, finding.code),
                finding.message,
                finding.help,
            );
        }
    }

    /// Claims the locations of a host.
    fn server(
        &mut self,
        host: &HostPattern,
        server: &Server<'_>,
        proxy: usize,
        patterns: Option<&Object<Ingress>>,
    ) {
        let before = self.claims.len();
        let whole = PathMatch::Prefix("/".to_owned());
        if let Some(ingress) = server.regex {
            let object = name_of::<Ingress>(&ingress.meta);
            let cors = server.locations.iter().any(|l| matches!(l.outcome, Outcome::Answer(_)));
            if cors {
                self.note(
                    &object,
                    &ingress.meta,
                    "metadata.annotations",
                    (Severity::Warning, "host-by-regex"),
                    format!(
                        "`use-regex` or `rewrite-target` makes nginx match all paths of {host} as regular expressions, so \
                         all its preflights go to the proxy"
                    ),
                    "Move it to a host of its own.",
                );
            }
            let claim = Claim { object: &object, rule: 0, proxy, one_label: true };
            self.claims.add(claim, host, whole, &[], Outcome::Pass(PassReason::Unsupported));
            return;
        }
        let alias = server.alias.filter(|_| server.locations.is_empty());
        if let Some(ingress) = alias.or(server.taken).or(patterns) {
            let object = name_of::<Ingress>(&ingress.meta);
            let claim = Claim { object: &object, rule: 0, proxy, one_label: true };
            self.claims.add(claim, host, whole, &[], Outcome::Pass(PassReason::Unsupported));
            return;
        }
        // `location = /x`, by path: an Exact path before what a prefix makes beside itself.
        let mut exact: BTreeMap<&str, &Location<'_>> = BTreeMap::new();
        let mut elements: BTreeMap<&str, &Location<'_>> = BTreeMap::new();
        let mut strings: BTreeMap<&str, &Location<'_>> = BTreeMap::new();
        for location in server.locations.iter().filter(|l| l.path.starts_with('/') && !always_passes(&l.path))
        {
            let path = &*location.path;
            match location.kind {
                "Exact" => exact.entry(path).or_insert(location),
                "Prefix" => elements.entry(path.strip_suffix('/').unwrap_or(path)).or_insert(location),
                _ if path == "/" => elements.entry("").or_insert(location),
                _ => strings.entry(path).or_insert(location),
            };
        }
        let mut claims: Vec<(PathMatch, &Location<'_>, Outcome)> = Vec::new();
        claims.extend(exact.iter().map(|(path, l)| (PathMatch::Exact((*path).to_owned()), *l, l.outcome)));
        claims.extend(elements.iter().map(|(path, l)| (element_prefix(path), *l, l.outcome)));
        // Without its slash the path is a redirect, or another location's.
        for (path, location) in &elements {
            if !path.is_empty() && location.path.ends_with('/') && !exact.contains_key(path) {
                let outcome = Outcome::Pass(PassReason::Unsupported);
                claims.push((PathMatch::Exact((*path).to_owned()), location, outcome));
            }
        }
        for (path, location) in &strings {
            let shorter = |other: &str| path.len() > other.len() && path.starts_with(other);
            // What has the paths that begin like this one, but with a longer last element.
            let outside: BTreeSet<Outcome> = elements
                .iter()
                .filter(|(other, _)| shorter(other) && is_element_prefix(other, path))
                .chain(strings.iter().filter(|(other, _)| shorter(other)))
                .map(|(_, l)| l.outcome)
                .collect();
            let alone = outside.iter().all(|outcome| *outcome == location.outcome);
            if let Some(directory) = path.strip_suffix('/') {
                // The same.
                if !exact.contains_key(directory) && !elements.contains_key(directory) {
                    let outcome = Outcome::Pass(PassReason::Unsupported);
                    claims.push((PathMatch::Exact(directory.to_owned()), location, outcome));
                }
                if !elements.contains_key(directory) {
                    claims.push((element_prefix(directory), location, location.outcome));
                }
            } else if alone {
                if !elements.contains_key(path) {
                    claims.push((element_prefix(path), location, location.outcome));
                }
            } else {
                // nginx compares strings: `/api` has `/apis` too.
                claims.push((PathMatch::Regex(format!("{}.*", escaped(path))), location, location.outcome));
            }
        }
        for (path, location, outcome) in claims {
            let object = name_of::<Ingress>(&location.ingress.meta);
            let claim = Claim { object: &object, rule: 0, proxy, one_label: true };
            self.claims.add(claim, host, path, &[], outcome);
        }
        // A host without paths, or with none that is answered, is still not a wildcard's.
        if self.claims.len() == before {
            let object = ObjectName { kind: Ingress::KIND, key: Key::new("", &host.to_string()) };
            let claim = Claim { object: &object, rule: 0, proxy, one_label: true };
            self.claims.add(claim, host, whole, &[], Outcome::Pass(PassReason::NoCors));
        }
    }
}

/// Whether `prefix`, which has no slash at its end, is one of `path` by whole elements.
fn is_element_prefix(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
