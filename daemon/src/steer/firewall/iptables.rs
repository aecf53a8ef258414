//! What `iptables-save` prints, for iptables of old and over nftables alike.

use super::{Action, Base, Chain, Family, Hook, Rule, Test, Truth, flag, network, state};

/// The chains of every table. `program` is how places begin.
pub(super) fn parse(text: &str, family: Family, program: &str) -> Vec<Chain> {
    let program = if family == Family::V6 { program.replacen("ip", "ip6", 1) } else { program.to_owned() };
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = format!("{program} table {}", name.trim());
        } else if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            let name = words.next().unwrap_or_default().to_owned();
            let base =
                base(table.rsplit(' ').next().unwrap_or_default(), &name, words.next() == Some("DROP"));
            chains.push(Chain { table: table.clone(), name, family: Some(family), base, rules: Vec::new() });
        } else if line.starts_with("-A ") {
            let words = words(line);
            let Some(name) = words.get(1) else { continue };
            let is_chain = |name: &str| chains.iter().any(|c| c.table == table && c.name == name);
            let (tests, actions) = rule(&words[2..], &is_chain);
            let place = format!("{table}: {line}");
            if let Some(chain) = chains.iter_mut().find(|chain| chain.table == table && chain.name == *name) {
                chain.rules.push(Rule { place, tests, actions });
            }
        }
    }
    chains
}

/// `include/uapi/linux/netfilter_ipv4.h`: priorities of the tables.
fn base(table: &str, chain: &str, drops: bool) -> Option<Base> {
    let hook = match chain {
        "PREROUTING" => Hook::Prerouting,
        "INPUT" => Hook::Input,
        _ => return None,
    };
    let priority = match (table, hook) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", Hook::Prerouting) => -100,
        ("security", _) => 50,
        ("nat", _) => 100,
        _ => 0,
    };
    Some(Base { hook, priority, drops, devices: Vec::new() })
}

fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut begun) = (Vec::new(), String::new(), false, false);
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match c {
            '"' => (quoted, begun) = (!quoted, true),
            '\\' if quoted => word.extend(characters.next()),
            c if c.is_whitespace() && !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

fn rule(words: &[String], is_chain: &impl Fn(&str) -> bool) -> (Vec<Test>, Vec<Action>) {
    let (mut tests, mut actions) = (Vec::new(), Vec::new());
    let mut rest = words.iter().map(String::as_str).peekable();
    let mut not = false;
    while let Some(word) = rest.next() {
        if word == "!" {
            not = true;
            continue;
        }
        let mut value = || rest.next().unwrap_or_default();
        let test = match word {
            "-s" => from_address(value(), Test::From),
            "-d" => from_address(value(), Test::To),
            "-i" => Test::Interface(value().replace('+', "*")),
            "-p" => match value() {
                "tcp" | "6" | "all" => Test::ALWAYS,
                _ => Test::NEVER,
            },
            // Later fragments have no ports, and are never answered.
            "-f" => Test::NEVER,
            "--dport" | "--dports" => ports(value()),
            "--tcp-flags" => {
                let (mask, set) = (flags(value()), flags(value()));
                mask.zip(set).map_or(Test::MAYBE, |(mask, value)| Test::Flags { mask, value })
            }
            "--ctstate" | "--state" => states(value()),
            "--mark" => mark(value()),
            "--dst-type" => match value() {
                "LOCAL" => Test::ALWAYS,
                types if types.split(',').any(|kind| kind == "LOCAL") => Test::ALWAYS,
                _ => Test::NEVER,
            },
            "--comment" => {
                value();
                Test::ALWAYS
            }
            "-m" => match value() {
                // Their options say it all.
                "tcp" | "multiport" | "conntrack" | "state" | "mark" | "addrtype" | "comment" => continue,
                "udp" | "icmp" | "icmp6" | "icmpv6" | "sctp" | "dccp" | "esp" | "ah" => Test::NEVER,
                // Also those whose mere name asks for something.
                _ => Test::MAYBE,
            },
            "-j" => {
                let name = value();
                if is_chain(name) {
                    actions.push(Action::Jump(name.to_owned()));
                } else {
                    actions.extend(target(name));
                    // The rest are the target's options.
                    if name == "CT" && !rest.any(|option| option == "--notrack") {
                        actions.pop();
                    }
                }
                break;
            }
            "-g" => {
                actions.push(Action::Goto(value().to_owned()));
                break;
            }
            // Another option, whose words end where the next option begins.
            _ => {
                while rest.next_if(|word| *word != "!" && !word.starts_with('-')).is_some() {}
                not = false;
                tests.push(Test::MAYBE);
                continue;
            }
        };
        tests.push(test.negated(not));
        not = false;
    }
    tests.retain(|test| *test != Test::Known(Truth::Yes));
    (tests, actions)
}

/// What a target that is no chain does; also for nftables, which shows iptables' targets by name.
pub(super) fn target(name: &str) -> Option<Action> {
    Some(match name {
        "ACCEPT" => Action::Accept,
        "RETURN" => Action::Return,
        "DROP" => Action::Stop("drop"),
        "REJECT" => Action::Stop("reject"),
        "QUEUE" | "NFQUEUE" => Action::Stop("hand to a program"),
        "SYNPROXY" => Action::Stop("answer in the kernel's SYN proxy"),
        "DNAT" | "NETMAP" => Action::Divert("send elsewhere"),
        "REDIRECT" => Action::Divert("redirect to another port"),
        "TPROXY" => Action::Divert("hand to a transparent proxy"),
        "SNAT" | "MASQUERADE" => Action::Divert("rewrite the client's address of"),
        "MARK" | "CONNMARK" | "HMARK" => Action::Mark,
        "CT" | "NOTRACK" => Action::Untrack,
        "LOG" | "NFLOG" | "ULOG" | "TRACE" | "AUDIT" | "LED" | "TCPMSS" | "TCPOPTSTRIP" | "TTL" | "HL"
        | "DSCP" | "TOS" | "ECN" | "CLASSIFY" | "CHECKSUM" | "SET" | "TEE" | "RATEEST" | "SECMARK"
        | "CONNSECMARK" | "IDLETIMER" => return None,
        other => Action::Unclear(other.to_owned()),
    })
}

fn from_address(text: &str, test: impl Fn(std::net::IpAddr, std::net::IpAddr) -> Test) -> Test {
    network(text).map_or(Test::MAYBE, |(from, to)| test(from, to))
}

/// `80`, `80:90`, `22,80:90`.
fn ports(text: &str) -> Test {
    let port = |text: &str| text.parse::<u16>().ok();
    let range = |text: &str| match text.split_once(':') {
        Some((from, to)) => Some(Test::Port(port(from)?, port(to)?)),
        None => port(text).map(|port| Test::Port(port, port)),
    };
    text.split(',').map(range).collect::<Option<_>>().map_or(Test::MAYBE, Test::Any)
}

fn flags(text: &str) -> Option<u8> {
    match text {
        "NONE" => Some(0),
        // Without ECE and CWR, as iptables has it.
        "ALL" => Some(0x3f),
        names => names.split(',').try_fold(0, |flags, name| Some(flags | flag::bit(name)?)),
    }
}

fn states(text: &str) -> Test {
    let (mut states, mut others) = (0, false);
    for name in text.split(',') {
        match state::bit(name) {
            Some(bit) => states |= bit,
            // SNAT and DNAT, which are marks of connections.
            None => others = true,
        }
    }
    if others { Test::Any(vec![Test::State(states), Test::MAYBE]) } else { Test::State(states) }
}

/// `0x8000/0x8000`, `1`.
fn mark(text: &str) -> Test {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value), number(mask)),
        None => (number(text), Some(u32::MAX)),
    };
    value.zip(mask).map_or(Test::MAYBE, |(value, mask)| Test::Mark { mask, value })
}
