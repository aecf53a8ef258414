//! The preflights of a big installation: a thousand routes, origins that nobody has listed, methods and headers as scripts
//! ask for them, paths with numbers in them; and whether a browser would be content with an answer.
#![forbid(unsafe_code)]

use crate::{
    policies,
    workload::{Chrome, Request},
};
use preflightd_tests::random::Random;
use std::iter;

/// Hosts.
pub const HOSTS: usize = 100;
/// Path prefixes of each host, each with a policy of its own.
pub const PREFIXES: [&str; 10] = [
    "/v1/orders",
    "/v1/carts",
    "/v1/customers",
    "/v1/products",
    "/v1/payments",
    "/v1/invoices",
    "/v1/shipments",
    "/v2/search",
    "/auth/sessions",
    "/media",
];
/// Exact origins of each policy, of which none has another's.
pub const ORIGINS: usize = 20;
/// What every policy allows beside them.
pub const PREVIEWS: &str = "https://*.preview.example.com";
/// So many of a hundred preflights come from an origin of [`PREVIEWS`], as good as each from another one.
pub const PREVIEWS_PERCENT: usize = 3;

const PREVIEWS_END: &str = ".preview.example.com";
/// Method and headers that scripts ask for, and how many of a hundred do. Chrome sorts the headers.
const WISHES: [(&str, &str, usize); 8] = [
    ("GET", "authorization", 34),
    ("GET", "authorization,x-requested-with", 10),
    ("POST", "authorization,content-type", 20),
    ("POST", "content-type", 10),
    ("PUT", "authorization,content-type", 8),
    ("PATCH", "authorization,content-type,x-requested-with", 6),
    ("DELETE", "authorization", 8),
    ("DELETE", "", 4),
];
const ANDROID: &str = "Linux; Android 10; K";
const PLATFORMS: [&str; 4] =
    ["Windows NT 10.0; Win64; x64", "Macintosh; Intel Mac OS X 10_15_7", "X11; Linux x86_64", ANDROID];
const LANGUAGES: [&str; 3] = ["en-US,en;q=0.9", "en-GB,en;q=0.9", "de-DE,de;q=0.9,en;q=0.8"];

/// The policies, in preflightd's native dialect.
pub fn native() -> String {
    let policy = |host, route: usize| {
        let exact = (0..ORIGINS).map(|number| policies::origin(host, route, number));
        let origins: Vec<_> = exact.chain([PREVIEWS.to_owned()]).collect();
        policies::native_policy(host, route, PREFIXES[route], &origins)
    };
    (0..HOSTS).flat_map(|host| (0..PREFIXES.len()).map(move |route| policy(host, route))).collect()
}

/// A preflight that they allow.
pub fn sample() -> Request {
    Request::new(&policies::host(0), PREFIXES[0], &policies::origin(0, 0, 0))
}

/// One preflight of the mix; each is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preflight {
    /// The request, for a connection that stays open.
    pub head: Vec<u8>,
    origin: String,
    method: &'static str,
    headers: &'static str,
}

/// Preflights without end, the same ones for the same `seed`. Routes, and origins of a route, are equally frequent, which
/// is the hardest on whatever remembers some of them.
pub fn preflights(seed: u64) -> impl Iterator<Item = Preflight> {
    let mut random = Random::new(seed);
    iter::repeat_with(move || Preflight::random(&mut random))
}

impl Preflight {
    fn random(random: &mut Random) -> Self {
        let (host, route) = (random.below(HOSTS), random.below(PREFIXES.len()));
        let origin = if random.below(100) < PREVIEWS_PERCENT {
            format!("https://pr-{}-{:07x}{PREVIEWS_END}", 1000 + random.below(9000), random.below(1 << 28))
        } else {
            policies::origin(host, route, random.below(ORIGINS))
        };
        let (method, headers) = wish(random.below(100));
        let id = 1_000_000 + random.below(9_000_000);
        let query = match random.below(4) {
            0 => String::new(),
            1 => "?expand=items".into(),
            2 => format!("?page={}&per_page=50", 1 + random.below(40)),
            _ => "?include=customer".into(),
        };
        let platform = random.pick(&PLATFORMS);
        let mobile = if platform == ANDROID { " Mobile" } else { "" };
        let head = Chrome {
            host: &policies::host(host),
            target: &format!("{}/{id}{query}", PREFIXES[route]),
            origin: &origin,
            method,
            headers,
            platform,
            version: &format!("Chrome/{}.0.0.0{mobile}", 139 + random.below(4)),
            languages: random.pick(&LANGUAGES),
        };
        let head = head.head("keep-alive").into_bytes();
        Self { head, origin, method, headers }
    }

    /// Whether `response`, a whole one, is a 204 with which a browser lets the script go on (Fetch §4.8), with its
    /// credentials.
    pub fn is_right(&self, response: &[u8]) -> bool {
        let mut lines = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Response::new(&mut lines);
        let whole = parsed.parse(response) == Ok(httparse::Status::Complete(response.len()));
        let values = |name: &str| -> Vec<&[u8]> {
            let named = parsed.headers.iter().filter(|line| line.name.eq_ignore_ascii_case(name));
            named.map(|line| line.value).collect()
        };
        let lists = |name: &str, wanted: &str| {
            let list = values(name).join(&b","[..]);
            list.split(|byte| *byte == b',')
                .any(|item| item.trim_ascii().eq_ignore_ascii_case(wanted.as_bytes()))
        };
        let method = matches!(self.method, "GET" | "HEAD" | "POST")
            || lists("Access-Control-Allow-Methods", self.method);
        let mut headers = self.headers.split(',').filter(|name| !name.is_empty());
        whole
            && parsed.code == Some(204)
            && values("Access-Control-Allow-Origin") == [self.origin.as_bytes()]
            && values("Access-Control-Allow-Credentials") == [b"true"]
            && method
            && headers.all(|name| lists("Access-Control-Allow-Headers", name))
    }
}

/// The wish of number `percent` below 100.
fn wish(percent: usize) -> (&'static str, &'static str) {
    let mut left = percent;
    for (method, headers, share) in WISHES {
        if left < share {
            return (method, headers);
        }
        left -= share;
    }
    unreachable!("the shares of all wishes are a hundred")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policies::{HEADERS, METHODS};
    use std::collections::{HashMap, HashSet};

    const COUNT: usize = 20_000;

    /// How often each value came, of `COUNT` preflights.
    fn counted<K: Eq + std::hash::Hash>(key: impl Fn(&Preflight) -> K) -> HashMap<K, usize> {
        let mut counts = HashMap::new();
        for preflight in preflights(0).take(COUNT) {
            *counts.entry(key(&preflight)).or_default() += 1;
        }
        counts
    }

    fn line(preflight: &Preflight, name: &str) -> String {
        let text = String::from_utf8_lossy(&preflight.head);
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_default().to_owned()
    }

    fn path(preflight: &Preflight) -> String {
        let text = String::from_utf8_lossy(&preflight.head);
        text.split(' ').nth(1).expect("a target").to_owned()
    }

    #[test]
    fn a_seed_gives_the_same_preflights_again_and_another_one_others() {
        let draw = |seed| preflights(seed).take(1000).collect::<Vec<_>>();
        assert_eq!(draw(1), draw(1));
        let first: HashSet<_> = draw(1).into_iter().map(|one| one.head).collect();
        assert_eq!(draw(2).iter().filter(|one| first.contains(&one.head)).count(), 0);
    }

    #[test]
    fn shares_are_as_promised() {
        let near = |count: usize, percent: usize, name: &str| {
            let wanted = COUNT * percent / 100;
            assert!(count.abs_diff(wanted) < COUNT / 100, "{name}: {count} of {COUNT}, not {wanted}");
        };
        let previews = counted(|one| one.origin.ends_with(PREVIEWS_END));
        assert!(previews[&true].abs_diff(COUNT * PREVIEWS_PERCENT / 100) < COUNT / 250, "{previews:?}");
        let wishes = counted(|one| (one.method, one.headers));
        for (method, headers, percent) in WISHES {
            near(wishes[&(method, headers)], percent, &format!("{method} {headers}"));
        }
        let routes =
            counted(|one| (line(one, "Host"), path(one).rsplit_once('/').expect("a path").0.to_owned()));
        assert_eq!(routes.len(), HOSTS * PREFIXES.len());
        let of_routes: usize = routes.values().sum();
        assert_eq!(of_routes, COUNT);
        assert!(
            routes.values().all(|count| (3..60).contains(count)),
            "a route is rare or frequent: {routes:?}"
        );
    }

    #[test]
    fn wild_origins_and_paths_do_not_come_again() {
        let wild = counted(|one| one.origin.clone());
        let wild: Vec<_> = wild.iter().filter(|(origin, _)| origin.ends_with(PREVIEWS_END)).collect();
        assert!(wild.iter().all(|(_, count)| **count == 1), "{wild:?}");
        assert!(counted(path).len() > COUNT * 99 / 100);
    }

    #[test]
    fn every_preflight_is_allowed() {
        let shares: usize = WISHES.iter().map(|(_, _, share)| share).sum();
        assert_eq!(shares, 100);
        for (method, headers, _) in WISHES {
            assert!(METHODS.contains(&method), "{method}");
            assert!(headers.split(',').all(|name| name.is_empty() || HEADERS.contains(&name)), "{headers}");
        }
        let policies = native();
        assert_eq!(policies.matches("[[policy]]").count(), HOSTS * PREFIXES.len());
        for preflight in preflights(3).take(100) {
            let preview = preflight.origin.ends_with(PREVIEWS_END);
            let listed = policies.contains(&format!("\"{}\"", preflight.origin));
            assert_ne!(preview, listed, "{}", preflight.origin);
            assert_eq!(line(&preflight, "Origin"), preflight.origin);
            assert_eq!(line(&preflight, "Access-Control-Request-Method"), preflight.method);
            assert_eq!(line(&preflight, "Access-Control-Request-Headers"), preflight.headers);
        }
    }

    #[test]
    fn heads_are_as_long_as_chromes() {
        let lengths: Vec<_> = preflights(0).take(COUNT).map(|one| one.head.len()).collect();
        let mean = lengths.iter().sum::<usize>() / COUNT;
        assert!((520..560).contains(&mean), "{mean} bytes");
        assert!(lengths.iter().all(|length| (420..680).contains(length)));
        let first = preflights(0).next().expect("a preflight");
        assert!(first.head.ends_with(b"\r\n\r\n") && first.head.starts_with(b"OPTIONS /"), "{first:?}");
    }

    #[test]
    fn right_is_what_a_browser_is_content_with() {
        let origin = "https://o1-r0.shop-0.example";
        let preflight = Preflight {
            head: Vec::new(),
            origin: origin.into(),
            method: "PUT",
            headers: "authorization,content-type",
        };
        let good = format!(
            "HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n\
             access-control-allow-methods: GET, PUT\r\nAccess-Control-Allow-Headers: Authorization, content-type\r\n\r\n"
        );
        for (name, response, right) in [
            ("good", good.clone(), true),
            ("200", good.replace("204 No Content", "200 OK"), false),
            ("another's origin", good.replace("o1-r0", "o2-r0"), false),
            ("an origin that goes on", good.replace("shop-0.example", "shop-0.example.org"), false),
            ("any origin", good.replace(origin, "*"), false),
            ("two origins", good.replace("\r\n\r\n", "\r\nAccess-Control-Allow-Origin: x\r\n\r\n"), false),
            ("no credentials", good.replace("Credentials: true", "Credentials: false"), false),
            ("not the method", good.replace("GET, PUT", "GET, DELETE"), false),
            ("not all headers", good.replace(", content-type", ""), false),
            ("something behind it", format!("{good}x"), false),
            ("cut short", good[..good.len() - 2].to_owned(), false),
            ("no HTTP", "hello\r\n\r\n".into(), false),
        ] {
            assert_eq!(preflight.is_right(response.as_bytes()), right, "{name}");
        }
    }
}
