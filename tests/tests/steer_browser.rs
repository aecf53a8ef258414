//! A real browser against a steered nginx: what CORS allows succeeds, what it denies is blocked, and the preflights that
//! open a connection are a worker's.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use preflightd_tests::{
    Nginx,
    browser::Browser,
    site::{have, program, wait_until},
    steering::{Lab, Options, on_each_site, plain},
};
use serde_json::Value;

/// Where the pages are; another port is another origin.
const PAGES: u16 = 8080;

#[test]
fn chromium_over_a_steered_port() {
    if !have(&["chromium", "chromedriver"]) {
        return;
    }
    // nginx answers preflights too: those on a connection that it has are its own.
    let nginx = "location /open/ {
            add_header Access-Control-Allow-Origin $http_origin always;
            add_header Access-Control-Allow-Methods PUT always;
            add_header Access-Control-Allow-Headers x-demo always;
            if ($request_method = OPTIONS) { return 204; }
            return 200 '$request_method $http_x_demo';
        }
        location /closing/ {
            keepalive_timeout 0;
            add_header Access-Control-Allow-Origin $http_origin always;
            if ($request_method = OPTIONS) { return 405; }
            return 200 '$request_method $http_x_demo';
        }";
    let options = Options { nginx: nginx.to_owned(), policies: POLICIES.to_owned(), ..Options::default() };
    with_browser(options, browse);
}

/// The kernel answers, and the browser goes on with the same connections. nginx refuses each preflight that would open one.
#[test]
fn chromium_with_kernel_answers() {
    if !have(&["chromium", "chromedriver"]) || plain() {
        return;
    }
    let nginx = "location /open/ {
            set $opens '$request_method $connection_requests';
            if ($opens = 'OPTIONS 1') { return 405; }
            add_header Access-Control-Allow-Origin $http_origin always;
            add_header Access-Control-Allow-Methods PUT always;
            add_header Access-Control-Allow-Headers x-demo always;
            if ($request_method = OPTIONS) { return 204; }
            return 200 '$request_method $http_x_demo';
        }
        location /closing/ {
            keepalive_timeout 0;
            add_header Access-Control-Allow-Origin $http_origin always;
            if ($request_method = OPTIONS) { return 405; }
            return 200 '$request_method $http_x_demo';
        }";
    let options = Options {
        kernel_answers: true,
        nginx: nginx.to_owned(),
        policies: POLICIES.to_owned(),
        ..Options::default()
    };
    with_browser(options, browse_in_loops);
}

const POLICIES: &str = "[[policy]]
    name = \"open\"
    hosts = [\"*\"]
    paths = [{ prefix = \"/open\" }, { prefix = \"/closing\" }]
    origins = [\"http://10.78.0.1:8080\", \"http://[fd00:78::1]:8080\"]
    methods = [\"PUT\"]
    headers = [\"x-demo\"]
    max_age = 0
    ";

/// Runs a test for each site of a lab: with a page of another origin, and a browser where the client is.
fn with_browser(options: Options, test: fn(&Lab, SocketAddr, SocketAddr, &Browser)) {
    on_each_site(options, |lab, site| {
        let pages = Nginx::start_with(&[], lab.node().command(program("nginx").expect("nginx")), |_| {
            format!(
                "server {{
                    listen 0.0.0.0:{PAGES}; listen [::]:{PAGES};
                    location / {{ default_type text/html; return 200 '<title>page</title>'; }}
                }}"
            )
        });
        let page = SocketAddr::new(site.ip(), PAGES);
        wait_until("the pages", || lab.try_connect(page).is_ok());
        // The browser and its driver live where the client does.
        lab.client(0).enter(|| {
            let browser = Browser::start().expect("just looked for");
            test(lab, site, page, &browser);
        });
        drop(pages);
    });
}

fn browse(lab: &Lab, site: SocketAddr, page: SocketAddr, browser: &Browser) {
    let workers = || if lab.is_steered() { lab.flows("worker") } else { 0 };
    let before = workers();
    let fetch = |path: &str, method: &str, header: &str| {
        browser.run(&format!(
            "const response = await fetch('http://{site}{path}', {{method: '{method}', headers: {{'{header}': '1'}}}});
            return await response.text();"
        ))
    };
    browser.open(&format!("http://{page}/"));
    for i in 0..10 {
        let path = format!("/open/{i}");
        let body = fetch(&path, "PUT", "x-demo").unwrap_or_else(|e| panic!("{site}, {path}: {e}"));
        assert_eq!(body, "PUT 1", "{site}, {path}");
    }
    if lab.is_steered() {
        // nginx closes the connection that the browser still has, behind this; the next preflight would be its own.
        browser
            .run(&format!("await fetch('http://{site}/closing/first', {{mode: 'no-cors'}}); return '';"))
            .unwrap_or_else(|e| panic!("{site}, /closing/first: {e}"));
        // On these paths only a worker allows anything, and nginx closes each connection: every preflight opens one.
        for i in 0..10 {
            let path = format!("/closing/{i}");
            let body = fetch(&path, "PUT", "x-demo").unwrap_or_else(|e| panic!("{site}, {path}: {e}"));
            assert_eq!(body, "PUT 1", "{site}, {path}");
        }
        assert!(workers() > before, "{site}: no preflight was a worker's");
    }
    for (path, method, header) in [("/open/d", "DELETE", "x-demo"), ("/open/h", "PUT", "x-other")] {
        let error = fetch(path, method, header).expect_err("the browser must block this");
        assert!(error.contains("Failed to fetch"), "{site}, {path}: {error}");
    }
    // nginx saw every PUT that was allowed, once, and no other request than those and preflights.
    let client = lab.client_address(0, site);
    let wanted = if lab.is_steered() { 20 } else { 10 };
    wait_until("nginx to log the PUTs", || lab.logged(&format!("{client} \"PUT /")) == wanted);
    assert_eq!(lab.logged("DELETE /"), 0, "{site}");
}

fn browse_in_loops(lab: &Lab, site: SocketAddr, page: SocketAddr, browser: &Browser) {
    const FETCHES: u64 = 50;
    let event = |event: &str| lab.metrics().count("preflightd_steer_events_total", &[("event", event)]);
    let by_workers = || lab.metrics().count("preflightd_steer_flows_total", &[("to", "worker")]);
    // Fetches one after the other, or all at once; gives the bodies, or throws at the first that fails.
    let fetches = |path: &str, at_once: bool| {
        let one = format!(
            "async i => {{
                const headers = {{'x-demo': String(i)}};
                const response = await fetch('http://{site}{path}' + i, {{method: 'PUT', headers}});
                return await response.text();
            }}"
        );
        let all = if at_once {
            format!("return await Promise.all([...Array({FETCHES}).keys()].map(one));")
        } else {
            format!("const all = []; for (let i = 0; i < {FETCHES}; i++) all.push(await one(i)); return all;")
        };
        let bodies = browser.run(&format!("const one = {one}; {all}"));
        let bodies = bodies.unwrap_or_else(|e| panic!("{site}, {path}, at once: {at_once}: {e}"));
        let wanted: Vec<_> = (0..FETCHES).map(|i| format!("PUT {i}")).collect();
        assert_eq!(bodies, Value::from(wanted), "{site}, {path}, at once: {at_once}");
    };
    let blocked = |path: &str, method: &str, header: &str| {
        let error = browser
            .run(&format!(
                "await fetch('http://{site}{path}', {{method: '{method}', headers: {{'{header}': '1'}}}}); return '';"
            ))
            .expect_err("the browser must block this");
        assert!(error.contains("Failed to fetch"), "{site}, {path}: {error}");
    };
    browser.open(&format!("http://{page}/"));
    let before = (event("kernel_answer"), event("handed_over"), by_workers());
    // nginx allows nothing here, and closes behind each response: each fetch takes an answer of the kernel's.
    fetches("/closing/loop/", false);
    fetches("/closing/at-once/", true);
    blocked("/closing/d", "DELETE", "x-demo");
    blocked("/closing/h", "PUT", "x-other");
    let ours = 2 * FETCHES + 2;
    if site.is_ipv4() {
        let answers = || event("kernel_answer") - before.0;
        wait_until("the kernel's answers to be counted", || answers() >= ours);
        // Each PUT went on where its preflight, or another one, had been answered.
        wait_until("the connections to be counted", || event("handed_over") >= before.1 + FETCHES);
        assert_eq!(by_workers(), before.2, "{site}: a preflight was not the kernel's");
    } else {
        // An IPv6 address in `Host` the kernel leaves to the workers.
        let answers = || event("kernel_answer") - before.0 + by_workers() - before.2;
        wait_until("the answers to be counted", || answers() >= ours);
    }
    // With the first PUT nginx has the connection, and answers the preflights that follow on it.
    fetches("/open/loop/", false);
    fetches("/open/at-once/", true);
    blocked("/elsewhere", "PUT", "x-demo");
    let client = lab.client_address(0, site);
    for path in ["/closing/loop/", "/closing/at-once/", "/open/loop/", "/open/at-once/"] {
        for i in 0..FETCHES {
            let line = format!("{client} \"PUT {path}{i} HTTP/1.1\" 200");
            wait_until(format_args!("{line}"), || lab.logged(&line) == 1);
        }
    }
    let count = |what: &str| lab.logged(&format!("{client} \"{what}"));
    assert_eq!(count("PUT "), 4 * FETCHES as usize, "{site}: what is denied, or twice");
    assert_eq!(count("OPTIONS /closing/"), 0, "{site}");
    assert_eq!(count("DELETE "), 0, "{site}");
}
