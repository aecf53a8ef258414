//! What a preflight is, written a second time and as plainly as can be: the tests and the fuzzer hold the reader to it.
//! It knows nothing of the reader, of httparse or of speed.

/// The parts of a preflight.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Preflight {
    pub(super) host: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) origin: Vec<u8>,
    pub(super) method: Vec<u8>,
    pub(super) headers: Vec<Vec<u8>>,
    pub(super) private_network: bool,
    /// The connection stays open.
    pub(super) keep: bool,
    /// By HTTP/1.0, where the answer must say so.
    pub(super) keep_1_0: bool,
    pub(super) len: usize,
}

/// The preflight at the start of `buf`, if there is a whole one that may be answered.
pub(super) fn preflight(buf: &[u8], max_bytes: usize) -> Option<Preflight> {
    let len = 4 + buf.windows(4).position(|four| four == b"\r\n\r\n")?;
    if len > max_bytes {
        return None;
    }
    // Latin-1: each byte is one char of the same value.
    let head: String = buf[..len - 4].iter().map(|&b| char::from(b)).collect();
    let mut lines = head.split("\r\n");
    let request_line: Vec<&str> = lines.next()?.split(' ').collect();
    let ["OPTIONS", target, version @ ("HTTP/1.0" | "HTTP/1.1")] = request_line[..] else { return None };
    let version_1_1 = version == "HTTP/1.1";

    let mut headers = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if !is_token(name) {
            return None;
        }
        if !value.chars().all(|c| c == '\t' || !c.is_control() || c >= '\u{80}') {
            return None;
        }
        headers.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])));
    }
    if headers.len() > 64 {
        return None;
    }
    let all = |name: &str| -> Vec<&str> { headers.iter().filter(|h| h.0 == name).map(|h| h.1).collect() };
    let at_most_one = |name: &str, allowed: &[&str]| match all(name)[..] {
        [] => true,
        [value] => allowed.contains(&value.to_ascii_lowercase().as_str()),
        _ => false,
    };
    // Names that matter here; those with an underscore instead of a `-` never stand for them.
    let known = [
        "access-control-request-headers",
        "access-control-request-method",
        "access-control-request-private-network",
        "content-length",
    ];
    let forbidden = [
        "authorization",
        "cookie",
        "expect",
        "http2-settings",
        "keep-alive",
        "max-forwards",
        "proxy-authorization",
        "proxy-connection",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-method",
        "x-original-uri",
        "x-original-url",
        "x-rewrite-url",
    ];
    for (name, _) in &headers {
        let dashed = name.replace('_', "-");
        if forbidden.contains(&dashed.as_str()) || (dashed != *name && known.contains(&dashed.as_str())) {
            return None;
        }
    }
    if !at_most_one("content-length", &["0"])
        || !at_most_one("connection", &["close", "keep-alive"])
        || !at_most_one("te", &["trailers"])
    {
        return None;
    }

    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let elements = path.strip_prefix('/')?;
    if !path.chars().all(|c| c.is_ascii_graphic() && !"%;\\#\"<>^`{|}".contains(c))
        || path.contains("//")
        || elements.split('/').any(|element| element == "." || element == "..")
        || !query.chars().all(|c| c.is_ascii_graphic() && c != '#')
    {
        return None;
    }

    let [host] = all("host")[..] else { return None };
    let [origin] = all("origin")[..] else { return None };
    let [method] = all("access-control-request-method")[..] else { return None };
    for value in [host, origin] {
        if value.is_empty() || !value.chars().all(|c| c.is_ascii_graphic()) {
            return None;
        }
    }
    if origin.contains(',') || !is_token(method) {
        return None;
    }
    let request_headers = all("access-control-request-headers");
    let private_network = all("access-control-request-private-network");
    if request_headers.len() > 32 || private_network.len() > 1 {
        return None;
    }
    let keep = match all("connection").first() {
        Some(word) => word.eq_ignore_ascii_case("keep-alive"),
        None => version_1_1,
    };
    let bytes = |value: &str| -> Vec<u8> { value.chars().map(|c| c as u8).collect() };
    Some(Preflight {
        host: bytes(host),
        target: bytes(target),
        origin: bytes(origin),
        method: bytes(method),
        headers: request_headers.into_iter().map(bytes).collect(),
        private_network: private_network == ["true"],
        keep,
        keep_1_0: keep && !version_1_1,
        len,
    })
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && !"\"(),/:;<=>?@[\\]{}".contains(c))
}
