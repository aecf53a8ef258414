//! nginx as ingress-nginx configures it: what the controller reads from an Ingress's annotations, and the directives that
//! its template makes of that (kubernetes/ingress-nginx v1.15: `annotations/cors`, `template.go`, `nginx.tmpl`).
//!
//! It shares nothing with the daemon's own reading of annotations, which is tested against it. Left out are the Lua phases,
//! which do not touch CORS.
#![forbid(unsafe_code)]

use crate::{
    Nginx,
    site::{program, skip},
};
use regex_automata::{Input, dfa::Automaton as _, dfa::dense, util::syntax};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

/// An Ingress's annotations, with or without the `nginx.ingress.kubernetes.io/` prefix.
pub type Annotations = BTreeMap<String, String>;

/// The CORS rules of one Ingress, as the controller hands them to its template.
#[derive(Clone, Debug)]
pub struct Cors {
    /// The directives that set `$cors` where the origin is allowed; none where no origin is.
    pub allow: String,
    /// `Access-Control-Allow-Methods`.
    pub methods: String,
    /// `Access-Control-Allow-Headers`.
    pub headers: String,
    /// `Access-Control-Allow-Credentials: true`.
    pub credentials: bool,
    /// `Access-Control-Expose-Headers`; empty: none.
    pub expose: String,
    /// `Access-Control-Max-Age`.
    pub max_age: i64,
}

/// A host and its paths.
#[derive(Clone, Debug)]
pub struct Server {
    /// A name, or `*.` and the rest of it.
    pub host: String,
    /// Path prefixes (`pathType: Prefix`), each with the rules of its Ingress; `None`: CORS is not enabled there.
    pub paths: Vec<(String, Option<Cors>)>,
}

/// The controller's own regexes and defaults, which the cases have from its source.
static CASES: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("../cases/ingress_nginx.json")).expect("the cases"));

impl Cors {
    /// Reads annotations; `None`: CORS is not enabled.
    pub fn read(annotations: &Annotations) -> Option<Self> {
        let get = |name| raw(annotations, name);
        if get("enable-cors").and_then(parse_bool) != Some(true) {
            return None;
        }
        let list = |name| {
            let value = checked(annotations, name, name).filter(|value| regex(name).is_match(value));
            value.unwrap_or_else(|| CASES["defaults"][name].as_str().expect("a default").to_owned())
        };
        let default_age = &CASES["defaults"]["cors-max-age"];
        Some(Self {
            allow: allow(&origins(annotations)),
            methods: list("cors-allow-methods"),
            headers: list("cors-allow-headers"),
            credentials: get("cors-allow-credentials").and_then(parse_bool).unwrap_or(true),
            expose: list("cors-expose-headers"),
            max_age: get("cors-max-age")
                .and_then(|text| text.parse().ok())
                .unwrap_or_else(|| default_age.as_i64().expect("a number")),
        })
    }

    /// What the template writes into each location of the Ingress.
    pub fn directives(&self) -> String {
        let set = |header: &str, value: &str| format!("more_set_headers '{header}: {value}';\n");
        let mut headers = set("Access-Control-Allow-Origin", "$http_origin");
        if self.credentials {
            headers += &set("Access-Control-Allow-Credentials", "true");
        }
        headers += &set("Access-Control-Allow-Methods", &self.methods);
        headers += &set("Access-Control-Allow-Headers", &self.headers);
        if !self.expose.is_empty() {
            headers += &set("Access-Control-Expose-Headers", &self.expose);
        }
        headers += &set("Access-Control-Max-Age", &self.max_age.to_string());
        format!(
            "{allow}\n\
             if ($request_method = 'OPTIONS') {{\nset $cors ${{cors}}options;\n}}\n\
             if ($cors = \"true\") {{\n{headers}}}\n\
             if ($cors = \"trueoptions\") {{\n{headers}\
             more_set_headers 'Content-Type: text/plain charset=UTF-8';\n\
             more_set_headers 'Content-Length: 0';\nreturn 204;\n}}\n",
            allow = self.allow
        )
    }
}

/// The origins that the controller makes of the annotation: `*` alone is all of them.
pub fn origins(annotations: &Annotations) -> Vec<String> {
    let validator = "cors-allow-origin (annotation validation, blanks removed)";
    let all = vec!["*".to_owned()];
    let Some(value) = checked(annotations, "cors-allow-origin", validator) else { return all };
    let entries: Vec<&str> = value.split(',').map(str::trim).collect();
    if entries.contains(&"*") {
        return all;
    }
    let good = regex("cors-allow-origin (each entry)");
    entries.into_iter().filter(|e| !e.is_empty() && good.is_match(e)).map(str::to_owned).collect()
}

/// The directives that set `$cors` where the origin is one of these, as the annotation has them.
pub fn allow(origins: &[String]) -> String {
    match origins {
        [] => String::new(),
        [all] if all == "*" => "set $http_origin *;\nset $cors 'true';".to_owned(),
        _ => {
            let alternatives: Vec<String> = origins.iter().map(|origin| origin_regex(origin)).collect();
            allow_matching(&alternatives.join("|"))
        }
    }
}

/// The same for origins that end in what this regular expression matches.
pub fn allow_matching(regex: &str) -> String {
    format!("if ($http_origin ~* ({regex})$ ) {{ set $cors 'true'; }}")
}

/// The template's `server` blocks on `address`, one of them for hosts that no Ingress has. All that is not answered goes to
/// `upstream`.
pub fn servers(address: SocketAddr, servers: &[Server], upstream: SocketAddr) -> String {
    let pass = format!("proxy_pass http://{upstream};");
    let mut config = format!(
        "access_log off;
        server_tokens off;
        more_clear_headers Server;
        uninitialized_variable_warn off;
        server_names_hash_max_size 16384;
        server_names_hash_bucket_size 128;
        client_header_buffer_size 1k;
        large_client_header_buffers 4 8k;
        server {{ listen {address} default_server reuseport backlog=4096; server_name _; location / {{ {pass} }} }}\n"
    );
    for server in servers {
        let name = server_name(&server.host);
        writeln!(config, "server {{\nlisten {address};\nserver_name {name};").expect("a string");
        for (path, cors) in &server.paths {
            let directives = cors.as_ref().map(Cors::directives).unwrap_or_default();
            let body = format!("{{\n{directives}{pass}\n}}\n");
            // `pathType: Prefix` goes by whole elements: the template has two locations for it.
            if path == "/" {
                write!(config, "location / {body}").expect("a string");
            } else {
                write!(config, "location {path}/ {body}location = {path} {body}").expect("a string");
            }
        }
        if server.paths.iter().all(|(path, _)| path != "/") {
            writeln!(config, "location / {{ {pass} }}").expect("a string");
        }
        config += "}\n";
    }
    config
}

/// A wildcard host's regex has exactly one label for its star.
pub fn server_name(host: &str) -> String {
    match host.strip_prefix("*.") {
        Some(rest) => format!(r"~^(?<subdomain>[\w-]+)\.{}$", rest.replace('.', r"\.")),
        None => host.to_owned(),
    }
}

/// The module that the template's `more_set_headers` is of.
pub fn load_module() -> String {
    format!("load_module {}/{MODULE};", modules().display())
}

/// Starts nginx with these servers; `None`, said on stderr, where nginx or the module is not installed (in CI that fails).
pub fn start(address: SocketAddr, servers: &[Server], upstream: SocketAddr) -> Option<Nginx> {
    let Some(nginx) = program("nginx").filter(|_| modules().join(MODULE).is_file()) else {
        skip("nginx with its headers-more module");
        return None;
    };
    let main = format!("{}\nworker_processes 1;", load_module());
    let config = self::servers(address, servers, upstream);
    Some(Nginx::start_main(&main, &[address], Command::new(nginx), |_| config))
}

const MODULE: &str = "ngx_http_headers_more_filter_module.so";

/// Debian's and Fedora's places for dynamic modules.
fn modules() -> PathBuf {
    let places = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"].map(Path::new);
    places.into_iter().find(|place| place.is_dir()).unwrap_or(places[0]).to_owned()
}

fn raw<'a>(annotations: &'a Annotations, name: &str) -> Option<&'a str> {
    let prefixed = format!("nginx.ingress.kubernetes.io/{name}");
    annotations.get(&prefixed).or_else(|| annotations.get(name)).map(String::as_str)
}

/// The value of an annotation that passes its check. The check sees it without blanks, the parser each line trimmed.
fn checked(annotations: &Annotations, name: &str, validator: &str) -> Option<String> {
    let raw = raw(annotations, name)?;
    let valid = raw.is_empty() || regex(validator).is_match(&raw.replace(' ', ""));
    let lines: Vec<&str> = raw.split('\n').map(str::trim).collect();
    Some(lines.join("\n")).filter(|value| valid && !value.is_empty())
}

/// `(https://[A-Za-z0-9\-]+\.example)`: what RE2 reads as itself is quoted, the first star is a label.
fn origin_regex(origin: &str) -> String {
    let mut quoted = String::new();
    for c in origin.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    format!("({})", quoted.replacen(r"\*", r"[A-Za-z0-9\-]+", 1))
}

/// Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// One of the controller's regexes.
struct Regex(dense::DFA<Vec<u32>>);

impl Regex {
    fn is_match(&self, text: &str) -> bool {
        self.0.try_search_fwd(&Input::new(text)).expect("a search").is_some()
    }
}

/// By the name that the cases give it.
fn regex(name: &str) -> Regex {
    let pattern = CASES["regexes"][name].as_str().unwrap_or_else(|| panic!("no regex {name}"));
    let syntax = syntax::Config::new().unicode(false).utf8(false);
    Regex(dense::Builder::new().syntax(syntax).build(pattern).expect("a regex of the controller"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_read_as_the_projects_tests_expect() {
        for case in CASES["config_cases"].as_array().expect("cases") {
            let (name, parsed) = (&case["name"], &case["parsed"]);
            let annotations = serde_json::from_value(case["annotations"].clone()).expect("annotations");
            let read = Cors::read(&annotations);
            if parsed["enabled"] == false {
                assert!(read.is_none(), "{name}");
                continue;
            }
            let read = read.expect("enabled");
            let wanted = |field: &str, annotation: &str| match &parsed[field] {
                Value::String(default) if default == "<default>" => {
                    Some(CASES["defaults"][annotation].clone())
                }
                Value::Null => None,
                value => Some(value.clone()),
            };
            for (field, annotation, got) in [
                ("methods", "cors-allow-methods", Value::from(&*read.methods)),
                ("headers", "cors-allow-headers", Value::from(&*read.headers)),
                ("expose", "cors-expose-headers", Value::from(&*read.expose)),
                ("credentials", "", Value::from(read.credentials)),
                ("max_age", "cors-max-age", Value::from(read.max_age)),
            ] {
                if let Some(wanted) = wanted(field, annotation) {
                    assert_eq!(got, wanted, "{name}: {field}");
                }
            }
            if let Some(origins) = parsed["origins"].as_array() {
                let origins: Vec<_> = origins.iter().map(|o| o.as_str().expect("text").to_owned()).collect();
                assert_eq!(read.allow, allow(&origins), "{name}");
            }
        }
    }

    #[test]
    fn origins_become_one_regex() {
        let allow = allow(&["https://*.a-b.example:8080".into(), "null".into()]);
        let wanted = r"if ($http_origin ~* ((https://[A-Za-z0-9\-]+\.a-b\.example:8080)|(null))$ ) { set $cors 'true'; }";
        assert_eq!(allow, wanted);
        assert_eq!(server_name("*.a.example"), r"~^(?<subdomain>[\w-]+)\.a\.example$");
    }
}
