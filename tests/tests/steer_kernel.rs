//! Preflights that the kernel answers, on connections that then become the proxy's: by the sockets of a real kernel.

use preflightd_tests::{
    client::{get, preflight},
    site::wait_until,
    steering::{HOST, Lab, Options, allowed_preflight, check_get, on_each_site},
};

fn options() -> Options {
    Options { kernel_answers: true, ..Options::default() }
}

#[test]
fn preflights_and_then_the_proxys_requests_on_one_connection() {
    on_each_site(options(), |lab: &Lab, site| {
        let before = lab.is_steered().then(|| (lab.flows("kernel"), lab.flows("proxy")));
        for i in 0..20 {
            let mut client = lab.connect(site);
            for j in 0..i % 4 + 1 {
                let response = client.exchange(allowed_preflight(&format!("/items/{j}")));
                lab.expect_kernel(&response, format_args!("{site}, {i}, {j}"));
            }
            let denied = client.exchange(preflight(HOST, "/x", "https://evil.example", "PUT", None));
            if lab.is_steered() {
                assert_eq!((denied.status, denied.header("connection")), (403, None), "{site}: {denied:?}");
            }
            for path in ["/a", "/b"] {
                check_get(&client.exchange(get(HOST, path)), path);
            }
        }
        if let Some((kernel, proxy)) = before {
            // From the client's own address, and no preflight.
            let client = lab.client_address(0, site);
            let line = format!("80 {client} \"GET /b HTTP/1.1\" 200");
            wait_until("the GETs in the log", || lab.logged(&line) == 20);
            assert_eq!(lab.logged(&format!("{client} \"OPTIONS")), 0, "{:#?}", lab.nginx().access_log());
            wait_until("the counts", || (lab.flows("kernel"), lab.flows("proxy")) == (kernel + 20, proxy));
        }
    });
}
