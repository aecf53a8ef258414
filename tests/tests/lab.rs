//! The lab's own parts, tried without the daemon: real nginx, a real browser, the recording upstream.

use preflightd_tests::{
    Behaviour, Client, Nginx, Upstream,
    browser::Browser,
    client::get,
    site::{free_address, have, wait_until},
};

#[test]
fn nginx_serves() {
    if !have(&["nginx"]) {
        return;
    }
    let address = free_address();
    let nginx = Nginx::start(&[address], |_| {
        format!(
            "server {{ listen {address}; location / {{ return 200 \"$request_method $request_uri\"; }} }}"
        )
    });
    let mut client = Client::connect(address);
    let response = client.exchange(get("x.test", "/hello"));
    assert_eq!((response.status, response.body.as_slice()), (200, &b"GET /hello"[..]));
    wait_until("the access log", || {
        nginx.access_log().iter().any(|l| l.contains("GET /hello HTTP/1.1\" 200"))
    });
}

#[test]
fn upstream_records() {
    let upstream = Upstream::start(Behaviour::report());
    let mut client = Client::connect(upstream.address());
    client.send("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\n");
    assert_eq!(client.response().body, b"POST /a HTTP/1.1 +3");
    client.send("\r\n");
    assert_eq!(client.response().body, b"GET /b HTTP/1.1 +0");
    client.half_close();
    let recorded = upstream.ended(0);
    let all = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\n\r\n";
    assert_eq!(recorded.bytes.escape_ascii().to_string(), all.escape_ascii().to_string());
}

/// Chromium against nginx alone: the yardstick for what the daemon must not change.
#[test]
fn browser_enforces_cors() {
    if !have(&["nginx"]) {
        return;
    }
    let Some(browser) = Browser::start() else { return };
    let (page, api) = (free_address(), free_address());
    let nginx = Nginx::start(&[page, api], |_| {
        format!(
            "server {{ listen {page}; location / {{ return 200 page; }} }}
            server {{ listen {api};
                location /open {{
                    add_header Access-Control-Allow-Origin http://{page} always;
                    add_header Access-Control-Allow-Methods PUT always;
                    return 200 open;
                }}
                location / {{ return 200 closed; }}
            }}"
        )
    });
    browser.open(&format!("http://{page}/"));
    let put = |path: &str| {
        browser.run(&format!(
            "const r = await fetch('http://{api}{path}', {{method: 'PUT', body: 'x'}}); return await r.text();"
        ))
    };
    assert_eq!(put("/open").expect("an allowed PUT"), "open");
    let blocked = put("/closed").expect_err("a PUT that is not allowed");
    assert!(blocked.contains("Failed to fetch"), "{blocked}");
    let log = nginx.access_log();
    assert!(log.iter().any(|l| l.contains("OPTIONS /closed")), "{log:?}");
    assert!(!log.iter().any(|l| l.contains("PUT /closed")), "{log:?}");
}
