//! What `nft --json list ruleset` prints; its schema is libnftables-json(5).

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use serde_json::Value;

use super::{Action, Base, Chain, Family, Hook, Rule, Test, Truth, flag, iptables, network, state};

pub(super) struct Parsed {
    pub(super) chains: Vec<Chain>,
    /// Families with rules of iptables, of which nft shows only names.
    pub(super) opaque: BTreeSet<Family>,
}

/// Family, table and name.
type Name<'a> = (&'a str, &'a str, &'a str);

/// Reads the whole rule set.
///
/// # Errors
/// If it is not JSON, or not of that schema.
pub(super) fn parse(text: &str) -> serde_json::Result<Parsed> {
    let ruleset: Value = serde_json::from_str(text)?;
    let Some(objects) = ruleset["nftables"].as_array() else {
        return Err(serde::de::Error::custom("no list `nftables`"));
    };
    let mut parsed = Parsed { chains: Vec::new(), opaque: BTreeSet::new() };
    let mut sets: HashMap<Name<'_>, &Value> = HashMap::new();
    let mut numbers: HashMap<Name<'_>, usize> = HashMap::new();
    for object in objects {
        for kind in ["set", "map"] {
            if let Some(set) = object.get(kind) {
                sets.insert(name(set, "name"), set);
            }
        }
        if let Some(chain) = object.get("chain") {
            let (family, table, chain_name) = name(chain, "name");
            let Some(of) = family_of(family) else { continue };
            numbers.insert((family, table, chain_name), parsed.chains.len());
            parsed.chains.push(Chain {
                table: format!("nft table {family} {table}"),
                name: chain_name.to_owned(),
                family: of,
                base: base(chain),
                rules: Vec::new(),
            });
        }
    }
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let (family, table, chain) = name(rule, "chain");
        let Some(&number) = numbers.get(&(family, table, chain)) else { continue };
        let place = format!(
            "nft table {family} {table}, chain {chain}, rule with handle {}{}",
            rule["handle"],
            rule["comment"].as_str().map(|comment| format!(" ({comment})")).unwrap_or_default()
        );
        let reader = Reader { family, table, sets: &sets };
        let expressions = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
        if expressions.iter().any(|expression| expression.get("xt").is_some()) {
            parsed.opaque.extend(parsed.chains[number].family);
        }
        let rules = reader.rules(&place, expressions);
        parsed.chains[number].rules.extend(rules);
    }
    Ok(parsed)
}

fn name<'a>(object: &'a Value, key: &str) -> Name<'a> {
    let text = |key: &str| object[key].as_str().unwrap_or_default();
    (text("family"), text("table"), text(key))
}

/// `None`: packets that do not concern us. `Some(None)`: both.
#[expect(clippy::option_option, reason = "a family, both families, or one that is not looked at")]
fn family_of(family: &str) -> Option<Option<Family>> {
    match family {
        "ip" => Some(Some(Family::V4)),
        "ip6" => Some(Some(Family::V6)),
        "inet" | "netdev" => Some(None),
        _ => None,
    }
}

fn base(chain: &Value) -> Option<Base> {
    let hook = match chain["hook"].as_str()? {
        "ingress" => Hook::Ingress,
        "prerouting" => Hook::Prerouting,
        "input" => Hook::Input,
        _ => return None,
    };
    let devices = match &chain["dev"] {
        Value::String(device) => vec![device.clone()],
        Value::Array(devices) => devices.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let drops = chain["policy"].as_str() == Some("drop");
    Some(Base { hook, priority: chain["prio"].as_i64().unwrap_or(0), drops, devices })
}

/// What a rule looks at.
enum Key {
    /// Of the IP payload.
    Protocol,
    Family,
    Port,
    Flags(u8),
    State,
    Interface,
    To,
    From,
    Mark(u32),
    /// Of the destination: `local`, `broadcast`.
    Kind,
    PacketType,
    /// The interface that the way back to the client leaves by, if it is that of the packet.
    WayBack,
    /// Something that no packet has that is led through.
    None,
    Concat(Vec<Self>),
    Unknown,
}

struct Reader<'a> {
    family: &'a str,
    table: &'a str,
    sets: &'a HashMap<Name<'a>, &'a Value>,
}

impl Reader<'_> {
    /// One rule; several if it has a verdict map.
    fn rules(&self, place: &str, expressions: &[Value]) -> Vec<Rule> {
        let mut rules = Vec::new();
        let (mut tests, mut actions) = (Vec::new(), Vec::new());
        for expression in expressions {
            let Some((kind, value)) = expression.as_object().and_then(|object| object.iter().next()) else {
                // Such as the string "notrack" of older versions.
                let kind = expression.as_str().unwrap_or("?");
                actions.extend(self.statement(kind, &Value::Null, &mut tests));
                continue;
            };
            if kind == "vmap" {
                let looked_at = key(&value["key"], &mut tests);
                let Some(elements) = self.elements(&value["data"]) else {
                    actions.push(Action::Unclear("vmap".to_owned()));
                    continue;
                };
                for element in elements {
                    let (Some(wanted), Some(verdict)) = (element.get(0), element.get(1)) else { continue };
                    let verdict = verdict.as_object().and_then(|object| object.iter().next());
                    let Some((kind, value)) = verdict else { continue };
                    let (mut tests, mut actions) = (tests.clone(), actions.clone());
                    tests.push(one(&looked_at, "==", wanted));
                    actions.extend(self.statement(kind, value, &mut tests));
                    rules.push(Rule { place: place.to_owned(), tests, actions });
                }
                continue;
            }
            actions.extend(self.statement(kind, value, &mut tests));
        }
        tests.retain(|test| *test != Test::Known(Truth::Yes));
        rules.push(Rule { place: place.to_owned(), tests, actions });
        rules
    }

    fn statement(&self, kind: &str, value: &Value, tests: &mut Vec<Test>) -> Option<Action> {
        let target = || value["target"].as_str().unwrap_or_default().to_owned();
        Some(match kind {
            "match" => {
                let test = self.matches(value, tests);
                tests.push(test);
                return None;
            }
            "counter" | "log" | "last" | "dup" | "flow" | "continue" | "ct helper" | "ct timeout"
            | "ct expectation" | "secmark" | "tunnel" => return None,
            // They let through some packets and not others.
            "limit" | "quota" | "ct count" | "meter" | "set" | "map" => {
                tests.push(Test::MAYBE);
                return None;
            }
            "accept" => Action::Accept,
            "return" => Action::Return,
            "jump" => Action::Jump(target()),
            "goto" => Action::Goto(target()),
            "drop" => Action::Stop("drop"),
            "reject" => Action::Stop("reject"),
            "queue" => Action::Stop("hand to a program"),
            "synproxy" => Action::Stop("answer in the kernel's SYN proxy"),
            "fwd" => Action::Divert("send out of another interface"),
            "dnat" => Action::Divert("send elsewhere"),
            "redirect" => Action::Divert("redirect to another port"),
            "tproxy" => Action::Divert("hand to a transparent proxy"),
            "snat" | "masquerade" => Action::Divert("rewrite the client's address of"),
            "notrack" => Action::Untrack,
            "mangle" => {
                let key = &value["key"];
                let field = key["payload"]["field"].as_str();
                if key["meta"]["key"] == "mark" {
                    Action::Mark
                } else if matches!(field, Some("saddr" | "daddr" | "sport" | "dport")) {
                    Action::Divert("rewrite the addresses of")
                } else {
                    return None;
                }
            }
            "xt" => {
                let name = value["name"].as_str().unwrap_or_default();
                match value["type"].as_str() {
                    Some("match") if name == "comment" => return None,
                    Some("match") => {
                        tests.push(Test::MAYBE);
                        return None;
                    }
                    Some("target") => {
                        if name == "CT" {
                            // With or without --notrack.
                            tests.push(Test::MAYBE);
                        }
                        return iptables::target(name);
                    }
                    _ => Action::Unclear("xt".to_owned()),
                }
            }
            other => Action::Unclear(other.to_owned()),
        })
    }

    fn matches(&self, value: &Value, tests: &mut Vec<Test>) -> Test {
        let looked_at = key(&value["left"], tests);
        let op = value["op"].as_str().unwrap_or_default();
        let right = &value["right"];
        match op {
            "<" | ">" | "<=" | ">=" => {
                let (Key::Port, Some(port)) =
                    (&looked_at, right.as_u64().and_then(|port| u16::try_from(port).ok()))
                else {
                    return Test::MAYBE;
                };
                match op {
                    "<" => port.checked_sub(1).map_or(Test::NEVER, |port| Test::Port(0, port)),
                    ">" => port.checked_add(1).map_or(Test::NEVER, |port| Test::Port(port, u16::MAX)),
                    "<=" => Test::Port(0, port),
                    _ => Test::Port(port, u16::MAX),
                }
            }
            "==" | "in" | "!=" | "!" => {
                // `!`: none of these bits, the opposite of `in`.
                let op_of_one = if op == "!" { "in" } else { op };
                let any = match self.elements(right) {
                    // Who is banned changes at any time.
                    Some(_) if matches!(looked_at, Key::From) && is_named_set(right) => Test::MAYBE,
                    Some(wanted) => Test::Any(
                        wanted.into_iter().map(|wanted| one(&looked_at, op_of_one, wanted)).collect(),
                    ),
                    None => Test::MAYBE,
                };
                any.negated(op.starts_with('!'))
            }
            _ => Test::MAYBE,
        }
    }

    /// The elements of a set, or the one value. `None`: not known, or soon others.
    fn elements<'b>(&'b self, value: &'b Value) -> Option<Vec<&'b Value>> {
        let elements = match value {
            Value::String(name) if is_named_set(value) => {
                let set = self.sets.get(&(self.family, self.table, &name[1..]))?;
                // Filled by packets.
                let fleeting = |flag: &Value| flag == "dynamic" || flag == "timeout";
                if set["flags"].as_array().is_some_and(|flags| flags.iter().any(fleeting)) {
                    return None;
                }
                set.get("elem")
            }
            value => match value.get("set") {
                Some(elements) => Some(elements),
                None => return Some(vec![value]),
            },
        };
        Some(match elements {
            Some(Value::Array(elements)) => elements.iter().collect(),
            Some(element) => vec![element],
            None => Vec::new(),
        })
    }
}

/// What is looked at; what that presupposes is added to `tests`.
fn key(left: &Value, tests: &mut Vec<Test>) -> Key {
    let Some((kind, value)) = left.as_object().and_then(|object| object.iter().next()) else {
        return Key::Unknown;
    };
    match &**kind {
        "payload" => {
            let field = value["field"].as_str().unwrap_or_default();
            match value["protocol"].as_str().unwrap_or_default() {
                "tcp" | "th" => match field {
                    "dport" => Key::Port,
                    "flags" => Key::Flags(u8::MAX),
                    _ => Key::Unknown,
                },
                ip @ ("ip" | "ip6") => {
                    tests.push(Test::Family(if ip == "ip" { Family::V4 } else { Family::V6 }));
                    match field {
                        "saddr" => Key::From,
                        "daddr" => Key::To,
                        "protocol" | "nexthdr" => Key::Protocol,
                        _ => Key::Unknown,
                    }
                }
                "udp" | "udplite" | "sctp" | "dccp" | "icmp" | "icmpv6" | "igmp" | "esp" | "ah" | "comp"
                | "gre" | "arp" => {
                    tests.push(Test::NEVER);
                    Key::None
                }
                _ => Key::Unknown,
            }
        }
        "meta" => match value["key"].as_str().unwrap_or_default() {
            "l4proto" => Key::Protocol,
            "nfproto" | "protocol" => Key::Family,
            "iif" | "iifname" => Key::Interface,
            "mark" => Key::Mark(u32::MAX),
            "pkttype" => Key::PacketType,
            _ => Key::Unknown,
        },
        "ct" if value["key"] == "state" => Key::State,
        "fib" => {
            let has = |flag: &str| match &value["flags"] {
                Value::Array(flags) => flags.iter().any(|it| it == flag),
                it => it == flag,
            };
            match value["result"].as_str() {
                Some("type") if has("daddr") && !has("iif") => Key::Kind,
                Some("oif" | "oifname") if has("saddr") && has("iif") => Key::WayBack,
                _ => Key::Unknown,
            }
        }
        "&" => {
            let inner = key(&value[0], tests);
            match (inner, number(&value[1]), flags(&value[1])) {
                (Key::Mark(_), Some(mask), _) => Key::Mark(mask),
                (Key::Flags(_), _, Some(mask)) => Key::Flags(mask),
                _ => Key::Unknown,
            }
        }
        "concat" => {
            let parts = value.as_array().map(Vec::as_slice).unwrap_or_default();
            Key::Concat(parts.iter().map(|part| key(part, tests)).collect())
        }
        _ => Key::Unknown,
    }
}

/// Whether the key has this one value, or one of this range.
fn one(key: &Key, op: &str, wanted: &Value) -> Test {
    let wanted = wanted.get("elem").map_or(wanted, |element| element.get("val").unwrap_or(element));
    // The element for all others.
    if wanted == "*" && !matches!(key, Key::Interface) {
        return Test::MAYBE;
    }
    match key {
        Key::Protocol => match wanted {
            Value::String(name) => Test::Known(Truth::of(name == "tcp" || name == "6")),
            Value::Number(number) => Test::Known(Truth::of(number.as_u64() == Some(6))),
            _ => Test::MAYBE,
        },
        Key::Family => match wanted.as_str() {
            Some("ipv4" | "ip") => Test::Family(Family::V4),
            Some("ipv6" | "ip6") => Test::Family(Family::V6),
            Some("arp") => Test::NEVER,
            _ => Test::MAYBE,
        },
        Key::Port => {
            let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
            let range = match wanted.get("range") {
                Some(range) => port(&range[0]).zip(port(&range[1])),
                None => port(wanted).map(|port| (port, port)),
            };
            range.map_or(Test::MAYBE, |(from, to)| Test::Port(from, to))
        }
        Key::Flags(mask) => match (flags(wanted), op) {
            (Some(flags), "in") => Test::AnyFlag(flags & mask),
            (Some(value), _) => Test::Flags { mask: *mask, value },
            (None, _) => Test::MAYBE,
        },
        Key::State => states(wanted).map_or(Test::MAYBE, Test::State),
        Key::Interface => match wanted {
            Value::String(name) => Test::Interface(name.clone()),
            _ => Test::MAYBE,
        },
        Key::To => addresses(wanted).map_or(Test::MAYBE, |(from, to)| Test::To(from, to)),
        Key::From => addresses(wanted).map_or(Test::MAYBE, |(from, to)| Test::From(from, to)),
        Key::Mark(mask) => number(wanted).map_or(Test::MAYBE, |value| Test::Mark { mask: *mask, value }),
        Key::Kind => Test::Known(Truth::of(wanted == "local")),
        Key::PacketType => Test::Known(Truth::of(wanted == "host" || wanted == "unicast")),
        // Only flows whose way back is that of their packets are steered: it is never missing.
        Key::WayBack => match wanted {
            Value::Bool(there) => Test::Known(Truth::of(*there)),
            missing if missing == "0" || *missing == 0 => Test::NEVER,
            _ => Test::MAYBE,
        },
        Key::None => Test::NEVER,
        Key::Concat(keys) => match wanted["concat"].as_array() {
            Some(parts) if parts.len() == keys.len() => {
                Test::All(keys.iter().zip(parts).map(|(key, part)| one(key, op, part)).collect())
            }
            _ => Test::MAYBE,
        },
        Key::Unknown => Test::MAYBE,
    }
}

fn is_named_set(value: &Value) -> bool {
    value.as_str().is_some_and(|name| name.starts_with('@'))
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// `"syn"`, `["syn", "ack"]`, `{"|": ["syn", "ack"]}`, 2.
fn flags(value: &Value) -> Option<u8> {
    match value {
        Value::String(name) => flag::bit(name),
        Value::Number(number) => u8::try_from(number.as_u64()?).ok(),
        Value::Array(values) => values.iter().try_fold(0, |all, value| Some(all | flags(value)?)),
        value => flags(value.get("|")?),
    }
}

fn states(value: &Value) -> Option<u8> {
    match value {
        Value::String(name) => state::bit(name),
        Value::Array(values) => values.iter().try_fold(0, |all, value| Some(all | states(value)?)),
        value => states(value.get("|")?),
    }
}

fn addresses(value: &Value) -> Option<(IpAddr, IpAddr)> {
    if let Some(text) = value.as_str() {
        return network(text);
    }
    if let Some(prefix) = value.get("prefix") {
        return network(&format!("{}/{}", prefix["addr"].as_str()?, prefix["len"].as_u64()?));
    }
    let range = value.get("range")?;
    let address = |value: &Value| value.as_str()?.parse().ok();
    Some((address(&range[0])?, address(&range[1])?))
}
