//! A real browser against a steered nginx: what CORS allows succeeds, what it denies is blocked, and the preflights that
//! open a connection are a worker's.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use preflightd_tests::{
    Nginx,
    browser::Browser,
    site::{have, program, wait_until},
    steering::{Lab, Options, on_each_site},
};

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
    let policies = "[[policy]]
        name = \"open\"
        hosts = [\"*\"]
        paths = [{ prefix = \"/open\" }, { prefix = \"/closing\" }]
        origins = [\"http://10.78.0.1:8080\", \"http://[fd00:78::1]:8080\"]
        methods = [\"PUT\"]
        headers = [\"x-demo\"]
        max_age = 0
        ";
    let options = Options { nginx: nginx.to_owned(), policies: policies.to_owned(), ..Options::default() };
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
            browse(lab, site, page, &browser);
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
