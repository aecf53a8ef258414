//! Ingresses, as ingress-nginx serves them: each with rules of its own, over all of its paths.
//!
//! Source: ingress-nginx, `internal/ingress/controller/controller.go` (servers and locations),
//! `internal/ingress/controller/location.go` (path types), `rootfs/etc/nginx/template/nginx.tmpl`.

use super::{
    Cors, ObjectName, Outcome, Run, always_passes, claims::Claim, element_prefix, host_pattern,
    kgateway::escaped, name_of, opted_out,
};
use crate::{
    policy::{HostPattern, PathMatch, Severity, dialect::ingress_nginx},
    reason::PassReason,
    sources::kubernetes::objects::{Ingress, IngressClass, Key, Object},
};
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
    "server-snippet",
    "temporal-redirect",
];

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
    /// A name that an Ingress only adds.
    alias: Option<&'w Object<Ingress>>,
}

impl Run<'_> {
    pub(super) fn ingresses(&mut self) {
        let world = self.world;
        let mut ingresses: Vec<&Arc<Object<Ingress>>> = world.ingresses.values().collect();
        // What is older is first, and what is first has its path.
        ingresses.sort_by(|a, b| {
            a.meta.creation_timestamp.cmp(&b.meta.creation_timestamp).then_with(|| a.key().cmp(&b.key()))
        });
        let mut classes: BTreeMap<String, BTreeMap<HostPattern, Server<'_>>> = BTreeMap::new();
        for ingress in ingresses {
            let Some(class) = self.class_of(ingress) else { continue };
            self.ingress(ingress, classes.entry(class).or_default());
        }
        for (class, servers) in &classes {
            let Some(listeners) = self.listeners(|scope| scope.ingress_classes.contains(class)) else {
                continue;
            };
            for (host, server) in servers {
                self.server(host, server, &listeners);
            }
        }
    }

    /// The class that serves an Ingress, if it is one of ingress-nginx that concerns us.
    fn class_of(&self, ingress: &Object<Ingress>) -> Option<String> {
        let legacy = ingress.meta.annotations.get("kubernetes.io/ingress.class");
        let named = ingress.spec.ingress_class_name.as_ref().or(legacy);
        let is_default = |class: &Object<IngressClass>| {
            let annotation = class.meta.annotations.get("ingressclass.kubernetes.io/is-default-class");
            annotation.is_some_and(|value| value == "true")
        };
        let classes = &self.world.ingress_classes;
        let name = match named {
            Some(name) => name.clone(),
            None => match classes.values().find(|class| is_default(class)) {
                Some(class) => class.meta.name.clone(),
                None => self.settings.assume.map(|_| "nginx".to_owned())?,
            },
        };
        let wanted = &self.settings.ingress_classes;
        if !wanted.is_empty() {
            return wanted.contains(&name).then_some(name);
        }
        let ours = match classes.get(&Key::new("", &name)) {
            Some(class) => class.spec.controller == CONTROLLER,
            // Named as controllers have it by default, by an annotation or in manifests without classes.
            None => name == "nginx" && (legacy.is_some() || self.settings.assume.is_some()),
        };
        ours.then_some(name)
    }

    fn ingress<'w>(&mut self, ingress: &'w Object<Ingress>, servers: &mut BTreeMap<HostPattern, Server<'w>>) {
        let object = name_of::<Ingress>(&ingress.meta);
        let annotation = |name: &str| ingress.meta.annotations.get(&format!("{PREFIX}{name}"));
        if annotation("canary").is_some_and(|value| value == "true") {
            // Only another backend of locations that are there.
            return;
        }
        let outcome = self.outcome_of(&object, ingress);
        let regex = annotation("use-regex").is_some_and(|value| value == "true")
            || annotation("rewrite-target").is_some_and(|target| {
                ingress
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
                server.locations.push(Location { ingress, path: "/".to_owned(), kind: "Prefix", outcome });
            }
        }
        // Names that it is served under besides; which of several servers has them is nginx's to say.
        for alias in annotation("server-alias").map_or("", String::as_str).split(',').map(str::trim) {
            match host_pattern(alias) {
                _ if alias.is_empty() => {}
                Some(host) if host != HostPattern::Any => {
                    servers.entry(host).or_default().alias.get_or_insert(ingress);
                }
                _ => {
                    // A regular expression, which goes before the server of all names.
                    servers.entry(HostPattern::Any).or_default().alias.get_or_insert(ingress);
                }
            }
        }
    }

    /// What becomes of preflights to an Ingress.
    fn outcome_of(&mut self, object: &ObjectName, ingress: &Object<Ingress>) -> Outcome {
        if opted_out(self.world, &ingress.meta) {
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
        if annotations.is_empty() {
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
        let forced = annotation("force-ssl-redirect").is_some_and(|value| value == "true");
        let redirects = annotation("ssl-redirect").is_none_or(|value| value != "false");
        if forced || redirects && !ingress.spec.tls.is_empty() {
            let field = if forced {
                "metadata.annotations[nginx.ingress.kubernetes.io/force-ssl-redirect]"
            } else {
                "spec.tls"
            };
            self.note(
                object,
                &ingress.meta,
                field,
                (Severity::Warning, "redirects-to-https"),
                "nginx redirects plain HTTP to HTTPS there, so its preflights on plain ports go to the proxy",
                "Nothing if clients come by TLS; where TLS ends before the proxy, set \
                 `nginx.ingress.kubernetes.io/ssl-redirect: \"false\"`.",
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
    fn server(&mut self, host: &HostPattern, server: &Server<'_>, listeners: &[crate::policy::ListenerId]) {
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
            let claim = Claim { object: &object, rule: 0, listeners, one_label: true };
            self.claims.add(claim, host, whole, &[], Outcome::Pass(PassReason::Unsupported));
            return;
        }
        if let Some(ingress) = server.alias
            && (server.locations.is_empty() || *host == HostPattern::Any)
        {
            let object = name_of::<Ingress>(&ingress.meta);
            let claim = Claim { object: &object, rule: 0, listeners, one_label: true };
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
                // Without its slash the path is another location's, or a redirect.
                if !exact.contains_key(directory) && !elements.contains_key(directory) {
                    let outcome = if alone && !outside.is_empty() {
                        location.outcome
                    } else {
                        Outcome::Pass(PassReason::Unsupported)
                    };
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
            let claim = Claim { object: &object, rule: 0, listeners, one_label: true };
            self.claims.add(claim, host, path, &[], outcome);
        }
    }
}

/// Whether `prefix`, which has no slash at its end, is one of `path` by whole elements.
fn is_element_prefix(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
