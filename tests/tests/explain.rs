//! What `explain` prints is what the running daemon sends.

use preflightd_tests::{
    Behaviour, Config, Daemon, Upstream,
    client::preflight,
    daemon::{ORIGIN, POLICY, run},
};

#[test]
fn explain_tells_the_bytes_on_the_wire() {
    let upstream = Upstream::start(Behaviour::report());
    let daemon = Daemon::start(Config::new(upstream.address(), POLICY));
    let config = daemon.config_file();
    for (origin, method) in [(ORIGIN, "PUT"), (ORIGIN, "PATCH"), ("https://evil.example", "PUT")] {
        let request = preflight("api.test", "/x", origin, method, Some("x-demo"));
        let sent = daemon.connect().exchange(request).raw.escape_ascii().to_string();
        let output = run([
            "explain".as_ref(),
            "--config".as_ref(),
            config.as_os_str(),
            "--url".as_ref(),
            "http://api.test/x".as_ref(),
            "--origin".as_ref(),
            origin.as_ref(),
            "--method".as_ref(),
            method.as_ref(),
            "--header".as_ref(),
            "x-demo".as_ref(),
        ]);
        // Each line of the answer stands in a line of its own, its ends made visible.
        let said = String::from_utf8_lossy(&output.stdout);
        for line in sent.split_inclusive("\\r\\n").filter(|line| !line.starts_with("Date")) {
            assert!(said.lines().any(|l| l.trim() == line), "{line} is not in: {said}");
        }
    }
}
