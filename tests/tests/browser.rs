//! A real browser: Chromium loads pages from nginx and fetches another origin through preflightd in front of that
//! nginx. What CORS allows succeeds, what it denies is blocked by the browser itself.

use preflightd_tests::{
    Config, Daemon, Nginx,
    browser::Browser,
    site::{free_address, have, wait_until},
};

#[test]
fn chromium_obeys_the_answers() {
    if !have(&["nginx"]) {
        return;
    }
    let Some(browser) = Browser::start() else { return };
    // Two pages (so two origins), and the site behind the daemon.
    let (good, evil, site) = (free_address(), free_address(), free_address());
    let nginx = Nginx::start(&[good, evil, site], |_| {
        // As its application would: CORS headers on the actual responses. Preflights it would refuse with 405.
        // It closes after each response: on a connection that the relay has, preflights are the proxy's affair.
        format!(
            "server {{ listen {good}; location / {{ default_type text/html; return 200 '<title>good</title>'; }} }}
            server {{ listen {evil}; location / {{ default_type text/html; return 200 '<title>evil</title>'; }} }}
            server {{
                listen {site};
                keepalive_timeout 0;
                add_header Access-Control-Allow-Origin $http_origin always;
                add_header Access-Control-Allow-Credentials true always;
                if ($request_method = OPTIONS) {{ return 405; }}
                location / {{ return 200 \"$request_method $http_x_demo [$http_cookie]\"; }}
            }}"
        )
    });
    let policies = format!(
        r#"
        [[policy]]
        name = "open"
        hosts = ["*"]
        paths = [{{ prefix = "/open" }}]
        origins = ["http://{good}"]
        methods = ["PUT"]
        headers = ["x-demo"]
        max_age = 600

        [[policy]]
        name = "credentials"
        hosts = ["*"]
        paths = [{{ prefix = "/credentials" }}]
        origins = ["http://{good}"]
        methods = ["PUT"]
        headers = ["x-demo"]
        credentials = true
        "#
    );
    let daemon = Daemon::start(Config::new(site, policies));
    let api = daemon.address();

    let fetch = |path: &str, method: &str, header: &str, credentials: &str| {
        browser.run(&format!(
            "const response = await fetch('http://{api}{path}', {{
                method: '{method}', headers: {{'{header}': '1'}}, credentials: '{credentials}'}});
            return await response.text();"
        ))
    };
    let allowed = || daemon.metrics().count("preflightd_requests_total", &[("outcome", "allowed")]);
    let blocked = |result: Result<serde_json::Value, String>| {
        let error = result.expect_err("the browser must block this");
        assert!(error.contains("Failed to fetch"), "{error}");
    };

    browser.open(&format!("http://{good}/"));
    browser.run("document.cookie = 'session=s3cret'; return 0;").expect("setting a cookie");

    let put = fetch("/open/put", "PUT", "x-demo", "omit").expect("an allowed PUT with a custom header");
    assert_eq!(put, "PUT 1 []");
    assert_eq!(allowed(), 1);
    // The browser keeps the answer for max_age: no second preflight.
    let put = fetch("/open/put", "PUT", "x-demo", "omit").expect("the same PUT again");
    assert_eq!(put, "PUT 1 []");
    assert_eq!(allowed(), 1);

    blocked(fetch("/open/delete", "DELETE", "x-demo", "omit"));
    blocked(fetch("/open/header", "PUT", "x-other", "omit"));
    // A cookie needs Access-Control-Allow-Credentials in the preflight's answer.
    blocked(fetch("/open/cookie", "PUT", "x-demo", "include"));
    let put = fetch("/credentials/put", "PUT", "x-demo", "include").expect("an allowed PUT with a cookie");
    assert_eq!(put, "PUT 1 [session=s3cret]");

    browser.open(&format!("http://{evil}/"));
    blocked(fetch("/open/evil", "PUT", "x-demo", "omit"));
    blocked(fetch("/credentials/evil", "PUT", "x-demo", "include"));

    let metrics = daemon.metrics();
    for (outcome, reason, policy, wanted) in [
        // The uncredentialed answer, and the one that lacked credentials.
        ("allowed", "", "open", 2),
        ("allowed", "", "credentials", 1),
        ("denied", "method", "open", 1),
        ("denied", "headers", "open", 1),
        ("denied", "origin", "open", 1),
        ("denied", "origin", "credentials", 1),
    ] {
        let labels = [("outcome", outcome), ("reason", reason), ("policy", policy)];
        assert_eq!(metrics.count("preflightd_requests_total", &labels), wanted, "{labels:?}");
    }
    // nginx saw the PUTs that were allowed, no other, and not one preflight.
    let logged = |what: &str| nginx.access_log().iter().filter(|line| line.contains(what)).count();
    wait_until("nginx to log the PUTs", || logged("PUT") >= 3);
    let log = nginx.access_log();
    let seen = |what: &str| log.iter().filter(|line| line.contains(what)).count();
    assert_eq!(seen("OPTIONS"), 0, "{log:#?}");
    assert_eq!(
        (seen("PUT /open/put"), seen("PUT /credentials/put"), seen("PUT"), seen("DELETE")),
        (2, 1, 3, 0),
        "{log:#?}"
    );
}

/// A browser sends later preflights over the connection of an earlier request, which the relay has: then the proxy
/// answers, and it must make no difference.
#[test]
fn chromium_reuses_relayed_connections() {
    if !have(&["nginx"]) {
        return;
    }
    let Some(browser) = Browser::start() else { return };
    let (page, site) = (free_address(), free_address());
    let nginx = Nginx::start(&[page, site], |_| {
        format!(
            "server {{ listen {page}; location / {{ default_type text/html; return 200 '<title>page</title>'; }} }}
            server {{
                listen {site};
                add_header Access-Control-Allow-Origin http://{page} always;
                add_header Access-Control-Allow-Methods PUT always;
                if ($request_method = OPTIONS) {{ return 204; }}
                location / {{ return 200 $request_method; }}
            }}"
        )
    });
    let policy = format!(
        "[[policy]]\nname = \"put\"\nhosts = [\"*\"]\norigins = [\"http://{page}\"]\nmethods = [\"PUT\"]\n"
    );
    let daemon = Daemon::start(Config::new(site, policy));
    browser.open(&format!("http://{page}/"));
    for i in 0..10 {
        let url = format!("http://{}/{i}", daemon.address());
        let body = browser
            .run(&format!("return await (await fetch('{url}', {{method: 'PUT'}})).text();"))
            .unwrap_or_else(|e| panic!("PUT {i}: {e}"));
        assert_eq!(body, "PUT", "PUT {i}");
    }
    wait_until("nginx to log the PUTs", || {
        nginx.access_log().iter().filter(|line| line.contains("PUT")).count() == 10
    });
    let answered = daemon.metrics().count("preflightd_requests_total", &[("outcome", "allowed")]);
    let log = nginx.access_log();
    let seen = |what: &str| log.iter().filter(|line| line.contains(what)).count() as u64;
    assert!(answered > 0, "{log:#?}");
    assert_eq!((answered + seen("OPTIONS"), seen("PUT")), (10, 10), "{log:#?}");
}
