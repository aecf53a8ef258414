use std::net::{TcpListener, TcpStream};

use socket2::{Domain, Protocol, Socket, Type};

use super::*;
use crate::steer::netns::{
    Netns,
    tests::{Scratch, have_root},
};

const ADDRESSES: &[&str] = &["127.0.0.1", "192.0.2.1", "::1", "fe80::1", "2001:db8::1"];

/// As kernels have it of their own accord.
const USUAL: Tracking = Tracking { loose: true, liberal: false };
const LIBERAL: Tracking = Tracking { loose: true, liberal: true };
const STRICT: Tracking = Tracking { loose: false, liberal: false };

/// The places of the obstacles for port 80 by `eth0` on a node with [`ADDRESSES`].
fn places(chains: &[Chain], tracking: Tracking) -> Vec<String> {
    judged(chains, tracking).into_iter().map(|obstacle| obstacle.place).collect()
}

fn judged(chains: &[Chain], tracking: Tracking) -> Vec<Obstacle> {
    let addresses: Vec<IpAddr> = ADDRESSES.iter().map(|a| a.parse().expect("an address")).collect();
    let interfaces = ["eth0".to_owned()];
    judge(chains, &Scene { ports: &[80], interfaces: &interfaces, addresses: &addresses, tracking })
}

/// An input chain with rules, whose handles are their numbers from 1 on.
fn input(policy: &str, rules: &[&str]) -> Vec<Chain> {
    let mut objects = vec![
        r#"{"set": {"family": "inet", "table": "filter", "name": "ports", "type": "inet_service", "elem": [80, 443]}}"#
            .to_owned(),
        r#"{"set": {"family": "inet", "table": "filter", "name": "banned", "type": "ipv4_addr", "flags": ["interval"]}}"#
            .to_owned(),
        r#"{"set": {"family": "inet", "table": "filter", "name": "dynamic", "type": "inet_service", "flags": ["timeout"]}}"#
            .to_owned(),
        r#"{"chain": {"family": "inet", "table": "filter", "name": "dropping"}}"#.to_owned(),
        r#"{"rule": {"family": "inet", "table": "filter", "chain": "dropping", "handle": 90, "expr": [{"drop": null}]}}"#
            .to_owned(),
        r#"{"chain": {"family": "inet", "table": "filter", "name": "empty"}}"#.to_owned(),
        format!(
            r#"{{"chain": {{"family": "inet", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "{policy}"}}}}"#
        ),
    ];
    for (i, rule) in rules.iter().enumerate() {
        objects.push(format!(
            r#"{{"rule": {{"family": "inet", "table": "filter", "chain": "input", "handle": {}, "expr": [{rule}]}}}}"#,
            i + 1
        ));
    }
    let text = format!(r#"{{"nftables": [{}]}}"#, objects.join(", "));
    nft::parse(&text).unwrap_or_else(|error| panic!("{error}: {text}")).chains
}

fn matches(op: &str, left: &str, right: &str) -> String {
    format!(r#"{{"match": {{"op": "{op}", "left": {left}, "right": {right}}}}}"#)
}

const TCP_PORT: &str = r#"{"payload": {"protocol": "tcp", "field": "dport"}}"#;
const TCP_FLAGS: &str = r#"{"payload": {"protocol": "tcp", "field": "flags"}}"#;
const STATE: &str = r#"{"ct": {"key": "state"}}"#;
const IIFNAME: &str = r#"{"meta": {"key": "iifname"}}"#;
const PROTOCOL: &str = r#"{"meta": {"key": "l4proto"}}"#;
const TO: &str = r#"{"payload": {"protocol": "ip", "field": "daddr"}}"#;
const FROM: &str = r#"{"payload": {"protocol": "ip", "field": "saddr"}}"#;
const DROP: &str = r#"{"drop": null}"#;
const ACCEPT: &str = r#"{"accept": null}"#;

#[test]
fn a_rule_that_may_stop_packets_is_an_obstacle_and_others_are_none() {
    let flags = |mask: &str| format!(r#"{{"&": [{TCP_FLAGS}, {mask}]}}"#);
    let handshake = flags(r#"["fin", "syn", "rst", "ack"]"#);
    let fib = |result: &str, of: &str| format!(r#"{{"fib": {{"result": "{result}", "flags": [{of}]}}}}"#);
    for (name, tests, want) in [
        ("all", String::new(), true),
        ("the port", matches("==", TCP_PORT, "80"), true),
        ("another port", matches("==", TCP_PORT, "22"), false),
        ("not another port", matches("!=", TCP_PORT, "22"), true),
        ("not the port", matches("!=", TCP_PORT, "80"), false),
        ("a list of ports", matches("==", TCP_PORT, r#"{"set": [22, {"range": [80, 90]}]}"#), true),
        ("a list of others", matches("==", TCP_PORT, r#"{"set": [22, {"range": [81, 90]}]}"#), false),
        ("a range", matches("==", TCP_PORT, r#"{"range": [79, 81]}"#), true),
        ("large ports", matches(">=", TCP_PORT, "1024"), false),
        ("small ports", matches("<", TCP_PORT, "81"), true),
        ("ports below", matches("<", TCP_PORT, "80"), false),
        ("a set", matches("==", TCP_PORT, r#""@ports""#), true),
        ("not of a set", matches("!=", TCP_PORT, r#""@ports""#), false),
        ("a set that packets fill", matches("==", TCP_PORT, r#""@dynamic""#), true),
        ("a set that is not there", matches("==", TCP_PORT, r#""@gone""#), true),
        ("TCP", matches("==", PROTOCOL, r#""tcp""#), true),
        ("TCP by its number", matches("==", PROTOCOL, r#"{"set": [6, 17]}"#), true),
        ("UDP", matches("==", PROTOCOL, r#""udp""#), false),
        ("UDP's port", matches("==", r#"{"payload": {"protocol": "udp", "field": "dport"}}"#, "80"), false),
        (
            "not UDP's port",
            matches("!=", r#"{"payload": {"protocol": "udp", "field": "dport"}}"#, "53"),
            false,
        ),
        (
            "any transport's port",
            matches("==", r#"{"payload": {"protocol": "th", "field": "dport"}}"#, "80"),
            true,
        ),
        (
            "the client's port",
            matches("==", r#"{"payload": {"protocol": "tcp", "field": "sport"}}"#, "80"),
            true,
        ),
        ("one client", matches("==", FROM, r#""203.0.113.7""#), true),
        ("banned clients, none yet", matches("==", FROM, r#""@banned""#), true),
        ("spoofed loopback", matches("==", FROM, r#"{"prefix": {"addr": "127.0.0.0", "len": 8}}"#), false),
        ("our address", matches("==", TO, r#""192.0.2.1""#), true),
        ("another address", matches("==", TO, r#""10.96.0.1""#), false),
        ("another network", matches("==", TO, r#"{"prefix": {"addr": "10.0.0.0", "len": 8}}"#), false),
        ("not our address", matches("!=", TO, r#"{"range": ["192.0.2.0", "192.0.2.9"]}"#), false),
        ("loopback", matches("==", IIFNAME, r#""lo""#), false),
        ("not loopback", matches("!=", IIFNAME, r#""lo""#), true),
        ("the interface", matches("==", IIFNAME, r#""eth*""#), true),
        ("others", matches("==", IIFNAME, r#"{"set": ["eth1", "docker*"]}"#), false),
        ("IPv6", matches("==", r#"{"meta": {"key": "nfproto"}}"#, r#""ipv6""#), true),
        ("new", matches("in", STATE, r#""new""#), true),
        ("new or untracked", matches("==", STATE, r#"{"set": ["new", "untracked"]}"#), true),
        ("established", matches("in", STATE, r#"["established", "related"]"#), false),
        ("not established", matches("!=", STATE, r#""established""#), true),
        ("invalid", matches("in", STATE, r#""invalid""#), true),
        ("SYNs", matches("==", &handshake, r#""syn""#), true),
        ("no SYNs", matches("!=", &handshake, r#""syn""#), true),
        ("SYN anywhere", matches("in", TCP_FLAGS, r#""syn""#), true),
        ("null scan", matches("!", TCP_FLAGS, r#"["fin", "syn", "rst", "psh", "ack", "urg"]"#), false),
        ("SYN and FIN", matches("==", &flags(r#"["fin", "syn"]"#), r#"["fin", "syn"]"#), true),
        (
            "SYN and FIN of newer versions",
            matches("==", &flags(r#"{"|": ["fin", "syn"]}"#), r#"{"|": ["fin", "syn"]}"#),
            true,
        ),
        ("SYN and RST", matches("==", &flags(r#"["syn", "rst"]"#), r#"["syn", "rst"]"#), false),
        ("FIN without ACK", matches("==", &flags(r#"["fin", "ack"]"#), r#""fin""#), true),
        ("a christmas tree", matches("==", TCP_FLAGS, r#"["fin", "psh", "urg"]"#), false),
        ("any PSH", matches("in", TCP_FLAGS, r#""psh""#), true),
        (
            "a mark that nobody sets",
            matches("==", r#"{"&": [{"meta": {"key": "mark"}}, 32768]}"#, "32768"),
            false,
        ),
        ("no mark", matches("==", r#"{"meta": {"key": "mark"}}"#, "0"), true),
        ("broadcast", matches("==", r#"{"meta": {"key": "pkttype"}}"#, r#""broadcast""#), false),
        ("to ourselves", matches("==", &fib("type", r#""daddr""#), r#""local""#), true),
        ("not to ourselves", matches("!=", &fib("type", r#""daddr""#), r#""local""#), false),
        ("no way back", matches("==", &fib("oif", r#""saddr", "iif""#), "false"), false),
        ("no way back by zero", matches("==", &fib("oif", r#""saddr", "mark", "iif""#), r#""0""#), false),
        ("a limit", r#"{"limit": {"rate": 5, "burst": 5, "per": "second", "inv": true}}"#.to_owned(), true),
        ("a match of iptables", r#"{"xt": {"type": "match", "name": "recent"}}"#.to_owned(), true),
        ("a comment of iptables", r#"{"xt": {"type": "match", "name": "comment"}}"#.to_owned(), true),
        (
            "counted and logged",
            r#"{"counter": {"packets": 0, "bytes": 0}}, {"log": {"prefix": "x"}}"#.to_owned(),
            true,
        ),
        (
            "two at once, both ours",
            matches(
                "==",
                &format!(r#"{{"concat": [{TO}, {TCP_PORT}]}}"#),
                r#"{"set": [{"concat": ["192.0.2.1", 80]}]}"#,
            ),
            true,
        ),
        (
            "two at once, one another's",
            matches(
                "==",
                &format!(r#"{{"concat": [{TO}, {TCP_PORT}]}}"#),
                r#"{"set": [{"concat": ["192.0.2.1", 81]}]}"#,
            ),
            false,
        ),
        ("what nobody knows", matches("==", r#"{"osf": {"key": "name"}}"#, r#""Linux""#), true),
    ] {
        let rule = if tests.is_empty() { DROP.to_owned() } else { format!("{tests}, {DROP}") };
        let found = !places(&input("accept", &[&rule]), USUAL).is_empty();
        assert_eq!(found, want, "{name}: {rule}");
    }
}

#[test]
fn every_verdict_that_keeps_packets_away_is_an_obstacle() {
    for (verdict, want) in [
        (DROP, "may drop "),
        (r#"{"reject": {"type": "tcp reset"}}"#, "may reject "),
        (r#"{"queue": null}"#, "may hand to a program "),
        (r#"{"dnat": {"addr": "10.0.0.1", "port": 80}}"#, "may send elsewhere "),
        (r#"{"redirect": {"port": 8080}}"#, "may redirect to another port "),
        (r#"{"tproxy": {"port": 8080}}"#, "may hand to a transparent proxy "),
        (r#"{"synproxy": {"mss": 1460, "wscale": 7}}"#, "SYN proxy "),
        (r#"{"snat": {"addr": "10.0.0.1"}}"#, "rewrite the client's address of "),
        (r#"{"jump": {"target": "dropping"}}"#, "may drop "),
        (r#"{"goto": {"target": "dropping"}}"#, "may drop "),
        (r#"{"xt": {"type": "target", "name": "REJECT"}}"#, "may reject "),
        (r#"{"xt": {"type": "target", "name": "NEWTHING"}}"#, "`NEWTHING` what is not known here"),
        (r#"{"newthing": {}}"#, "`newthing` what is not known here"),
        (
            r#"{"mangle": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "value": 8080}}"#,
            "rewrite the addresses",
        ),
        (ACCEPT, ""),
        (r#"{"return": null}"#, ""),
        (r#"{"continue": null}"#, ""),
        (r#"{"counter": null}"#, ""),
        (r#"{"notrack": null}"#, ""),
        (r#"{"jump": {"target": "empty"}}"#, ""),
        (r#"{"xt": {"type": "target", "name": "LOG"}}"#, ""),
        (r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}"#, ""),
        (r#"{"mangle": {"key": {"tcp option": {"name": "maxseg"}}, "value": 1400}}"#, ""),
    ] {
        let found = judged(&input("accept", &[verdict]), USUAL);
        let what: Vec<_> = found.iter().map(|obstacle| &*obstacle.what).collect();
        match want {
            "" => assert!(what.is_empty(), "{verdict}: {what:?}"),
            want => assert!(what.len() == 1 && what[0].contains(want), "{verdict}: {what:?}"),
        }
    }
}

#[test]
fn the_order_of_rules_counts() {
    const POLICY: &str = "nft table inet filter, chain input, its policy";
    let place = |handle: u32| format!("nft table inet filter, chain input, rule with handle {handle}");
    let accept = |tests: &[String]| format!("{}, {ACCEPT}", tests.join(", "));
    let drop = |tests: &[String]| format!("{}, {DROP}", tests.join(", "));
    let port = matches("==", TCP_PORT, r#"{"set": [80, 443]}"#);
    let ssh = accept(&[matches("==", TCP_PORT, "22")]);
    let web = accept(std::slice::from_ref(&port));
    let known = accept(&[matches("in", STATE, r#"["established", "related"]"#)]);
    let is_invalid = matches("in", STATE, r#""invalid""#);
    let invalid = drop(std::slice::from_ref(&is_invalid));
    let syn_fin =
        drop(&[matches("==", &format!(r#"{{"&": [{TCP_FLAGS}, ["fin", "syn"]]}}"#), r#"["fin", "syn"]"#)]);
    let notrack = r#"{"notrack": null}"#;
    let others = format!("{}, {notrack}", matches("==", TCP_PORT, "22"));
    let some = format!("{}, {notrack}", matches("==", FROM, r#""203.0.113.7""#));
    let new = matches("in", STATE, r#""new""#);
    let handshake = format!(r#"{{"&": [{TCP_FLAGS}, ["fin", "syn", "rst", "ack"]]}}"#);
    let no_syn = drop(&[matches("!=", &handshake, r#""syn""#), new.clone()]);
    let mark = r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}"#;
    let marked = drop(&[matches("==", r#"{"meta": {"key": "mark"}}"#, "1")]);
    for (name, policy, rules, tracking, want) in [
        ("nothing at all", "accept", vec![], USUAL, vec![]),
        ("only SSH", "drop", vec![&*known, &ssh], USUAL, vec![POLICY.to_owned()]),
        ("SSH and the web", "drop", vec![&known, &ssh, &web], USUAL, vec![]),
        (
            "some clients",
            "drop",
            vec![&accept(&[matches("==", FROM, r#""203.0.113.7""#), port.clone()])],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        (
            "all clients by this interface",
            "drop",
            vec![&accept(&[matches("==", IIFNAME, r#""eth0""#), port.clone()])],
            USUAL,
            vec![],
        ),
        (
            "IPv4 alone",
            "drop",
            vec![&accept(&[matches("==", r#"{"meta": {"key": "nfproto"}}"#, r#""ipv4""#)])],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        ("dropped before it is accepted", "accept", vec![DROP, &web], USUAL, vec![place(1)]),
        ("accepted before it is dropped", "accept", vec![&web, DROP], USUAL, vec![]),
        ("invalid", "drop", vec![&known, &invalid, &web], USUAL, vec![place(2)]),
        ("invalid, liberal", "drop", vec![&known, &invalid, &web], LIBERAL, vec![place(2)]),
        ("invalid, untracked", "drop", vec![notrack, &known, &invalid, &web], STRICT, vec![]),
        ("invalid, others untracked", "drop", vec![&others, &invalid, &web], USUAL, vec![place(2)]),
        ("invalid, perhaps untracked", "drop", vec![&some, &invalid, &web], USUAL, vec![place(2)]),
        ("invalid behind the port", "drop", vec![&known, &web, &invalid], USUAL, vec![]),
        ("SYN and FIN", "drop", vec![&known, &syn_fin, &web], LIBERAL, vec![place(2)]),
        ("SYN and FIN, untracked", "drop", vec![notrack, &syn_fin, &web], USUAL, vec![place(2)]),
        ("SYN and FIN behind the port", "drop", vec![&web, &syn_fin], USUAL, vec![]),
        ("first by state, then by flags", "drop", vec![&invalid, &syn_fin, &web], USUAL, vec![place(1)]),
        (
            "new alone",
            "drop",
            vec![&known, &accept(&[port.clone(), new.clone()])],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        (
            "new alone, liberal",
            "drop",
            vec![&known, &accept(&[port.clone(), new.clone()])],
            LIBERAL,
            vec![POLICY.to_owned()],
        ),
        (
            "new and invalid",
            "drop",
            vec![&known, &accept(&[port.clone(), new.clone()]), &accept(&[port.clone(), is_invalid.clone()])],
            USUAL,
            vec![],
        ),
        ("invalid, strict", "drop", vec![&known, &invalid, &web], STRICT, vec![place(2)]),
        ("invalid behind the port, strict", "drop", vec![&web, &invalid], STRICT, vec![]),
        (
            "new alone, strict",
            "drop",
            vec![&known, &accept(&[port.clone(), new.clone()])],
            STRICT,
            vec![POLICY.to_owned()],
        ),
        ("new must be SYN", "accept", vec![&known, &no_syn], USUAL, vec![place(2)]),
        ("new must be SYN, untracked", "accept", vec![notrack, &no_syn], USUAL, vec![]),
        (
            "SYN alone",
            "drop",
            vec![&known, &accept(&[matches("==", &handshake, r#""syn""#), port.clone()])],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        ("marked before", "accept", vec![mark, &marked], USUAL, vec![place(2)]),
        ("marked behind", "accept", vec![&marked, mark], USUAL, vec![]),
        ("jump and back", "drop", vec![r#"{"jump": {"target": "empty"}}"#, &web], USUAL, vec![]),
        (
            "goto has no way back",
            "drop",
            vec![r#"{"goto": {"target": "empty"}}"#, &web],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        (
            "return is the chain's end",
            "drop",
            vec![r#"{"return": null}"#, &web],
            USUAL,
            vec![POLICY.to_owned()],
        ),
        (
            "a map of states",
            "drop",
            vec![
                r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}], ["new", {"accept": null}]]}}}"#,
            ],
            USUAL,
            vec![place(1)],
        ),
        (
            "a map of states, strict",
            "drop",
            vec![
                r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}], ["new", {"accept": null}]]}}}"#,
            ],
            STRICT,
            vec![place(1)],
        ),
        (
            "a map of ports",
            "accept",
            vec![
                r#"{"vmap": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "data": {"set": [[22, {"drop": null}], [80, {"accept": null}], [81, {"jump": {"target": "dropping"}}]]}}}"#,
                DROP,
            ],
            USUAL,
            vec![],
        ),
    ] {
        assert_eq!(places(&input(policy, &rules), tracking), want, "{name}");
    }
}

#[test]
fn the_remedy_fits_the_cause() {
    const SETTINGS: [&str; 2] = ["nf_conntrack_tcp_loose = 1", "nf_conntrack_tcp_be_liberal = 1"];
    let handshake = format!(r#"{{"&": [{TCP_FLAGS}, ["fin", "syn", "rst", "ack"]]}}"#);
    let ack = matches("==", &handshake, r#""ack""#);
    let no_syn = matches("!=", &handshake, r#""syn""#);
    let new_not_syn = format!("{no_syn}, {}, {DROP}", matches("in", STATE, r#""new""#));
    let is_invalid = matches("in", STATE, r#""invalid""#);
    let invalid = input("accept", &[&format!("{is_invalid}, {DROP}")]);
    let invalid_ack = input("accept", &[&format!("{ack}, {is_invalid}, {DROP}")]);
    let syn_fin = matches("==", &format!(r#"{{"&": [{TCP_FLAGS}, ["fin", "syn"]]}}"#), r#"["fin", "syn"]"#);
    let unseen =
        "may drop the first data of a steered flow to port 80, whose handshake the firewall did not see";
    let earlier = "may drop the first data of a steered flow to port 80, if tracking knows an earlier one";
    let copy = "the copy of a SYN to port 80 with FIN, which ends a TIME_WAIT";
    let copy_alone = format!("may drop {copy}");
    let (accept, notrack) = ("accept the port before this rule, without asking for a SYN", "notrack in raw");
    let ignore = r#"steer.firewall = "ignore""#;
    // Which settings help as well, and whether only the data.
    for (name, chains, tracking, what, remedy, settings, in_part) in [
        ("strict", &invalid, STRICT, [unseen, copy], [accept, notrack, ignore], &SETTINGS[..], true),
        ("invalid", &invalid, USUAL, [earlier, copy], [accept, notrack, ignore], &SETTINGS[1..], true),
        ("liberal", &invalid, LIBERAL, [&copy_alone, "would hang"], [accept, notrack, ignore], &[], false),
        ("strict, data", &invalid_ack, STRICT, [unseen; 2], [accept, notrack, ignore], &SETTINGS, false),
        ("data", &invalid_ack, USUAL, [earlier; 2], [accept, notrack, ignore], &SETTINGS[1..], false),
        (
            "SYN and FIN",
            &input("accept", &[&format!("{syn_fin}, {DROP}")]),
            USUAL,
            [&copy_alone, "would hang"],
            [accept, notrack, ignore],
            &[],
            false,
        ),
        (
            "no SYN",
            &input("accept", &[&new_not_syn]),
            USUAL,
            [unseen; 2],
            [accept, notrack, ignore],
            &[],
            false,
        ),
        (
            "drop",
            &input("accept", &[DROP]),
            USUAL,
            ["may drop TCP packets to port 80"; 2],
            ["accept the port before this rule", "may bypass it", ignore],
            &[],
            false,
        ),
        (
            "policy",
            &input("drop", &[]),
            STRICT,
            ["may drop TCP packets to port 80"; 2],
            ["before the chain's end", "may bypass it", ignore],
            &[],
            false,
        ),
        (
            "redirect",
            &input("accept", &[r#"{"redirect": {"port": 81}}"#]),
            USUAL,
            ["redirect"; 2],
            ["sends clients to"; 3],
            &[],
            false,
        ),
    ] {
        let found = judged(chains, tracking);
        let [obstacle] = &found[..] else { panic!("{name}: {found:?}") };
        let said = |text: &str, words: &[&str]| words.iter().all(|words| text.contains(words));
        assert!(said(&obstacle.what, &what) && said(&obstacle.remedy, &remedy), "{name}: {obstacle:?}");
        for setting in SETTINGS {
            let told = obstacle.remedy.contains(setting);
            assert_eq!(told, settings.contains(&setting), "{name}, {setting}: {obstacle:?}");
        }
        assert_eq!(obstacle.remedy.contains("for the data alone"), in_part, "{name}: {obstacle:?}");
    }
}

/// Printed by nft 1.0.6 with the tables of kube-proxy's nftables mode, shortened.
const KUBE_PROXY: &str = r#"{"nftables": [
{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "ip", "name": "kube-proxy", "handle": 13}},
{"map": {"family": "ip", "name": "service-ips", "table": "kube-proxy", "type": ["ipv4_addr", "inet_proto", "inet_service"], "handle": 7, "map": "verdict", "elem": [[{"concat": ["10.96.0.1", "tcp", 80]}, {"goto": {"target": "service-web"}}]]}},
{"map": {"family": "ip", "name": "nodeports", "table": "kube-proxy", "type": ["inet_proto", "inet_service"], "handle": 8, "map": "verdict", "elem": [[{"concat": ["tcp", NODEPORT]}, {"goto": {"target": "ep1"}}]]}},
{"set": {"family": "ip", "name": "cluster-ips", "table": "kube-proxy", "type": "ipv4_addr", "handle": 9, "elem": ["10.96.0.1", "10.96.0.10"]}},
{"set": {"family": "ip", "name": "nodeport-ips", "table": "kube-proxy", "type": "ipv4_addr", "handle": 10, "elem": ["192.0.2.1"]}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "service-web", "handle": 1}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "ep1", "handle": 2}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "services", "handle": 3}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "check", "handle": 4}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "input", "handle": 5, "type": "filter", "hook": "input", "prio": -110, "policy": "accept"}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "nat-prerouting", "handle": 6, "type": "nat", "hook": "prerouting", "prio": -100, "policy": "accept"}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "service-web", "handle": 12, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.96.0.1"}}, {"vmap": {"key": {"numgen": {"mode": "random", "mod": 2, "offset": 0}}, "data": {"set": [[0, {"goto": {"target": "ep1"}}], [1, {"goto": {"target": "ep1"}}]]}}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "ep1", "handle": 13, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}, {"dnat": {"addr": "10.244.0.5", "port": 8080}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "services", "handle": 14, "expr": [{"vmap": {"key": {"concat": [{"payload": {"protocol": "ip", "field": "daddr"}}, {"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}, "data": "@service-ips"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "services", "handle": 15, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@nodeport-ips"}}, {"vmap": {"key": {"concat": [{"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}, "data": "@nodeports"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "check", "handle": 16, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@cluster-ips"}}, {"reject": {"type": "icmp", "expr": "port-unreachable"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "check", "handle": 17, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": {"prefix": {"addr": "10.96.0.0", "len": 16}}}}, {"drop": null}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "input", "handle": 18, "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}}, {"jump": {"target": "check"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "nat-prerouting", "handle": 19, "expr": [{"jump": {"target": "services"}}]}}
]}"#;

#[test]
fn kube_proxy_is_in_the_way_of_its_own_ports_alone() {
    for (port, want) in [
        ("30080", vec![]),
        ("80", vec!["nft table ip kube-proxy, chain ep1, rule with handle 13".to_owned()]),
    ] {
        let parsed = nft::parse(&KUBE_PROXY.replace("NODEPORT", port)).expect("nft's JSON");
        assert_eq!(places(&parsed.chains, USUAL), want, "node port {port}");
    }
}

/// As `iptables-save` prints kube-proxy's, ufw's and fail2ban's rules, shortened.
const IPTABLES: &str = r#"# Generated by iptables-save v1.8.9 on Sat Nov 21 13:31:04 2026
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-WEB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service \"portals\" -j DROP" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/web" -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m comment --comment "last" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web" -m tcp --dport 30080 -j KUBE-SVC-WEB
-A KUBE-SVC-WEB -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.244.0.5:8080
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -j ufw-before-input
-A INPUT -j ufw-user-input
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE -j DROP
-A ufw-before-input -j ufw-not-local
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp -m multiport --dports 80,443,8000:8010 -j ACCEPT
COMMIT
"#;

#[test]
fn iptables_of_every_origin_is_understood() {
    let line = |rule: &str| format!("iptables table filter: {rule}");
    let mark = "-A PREROUTING -p tcp -m tcp --dport 80 -j MARK --set-xmark 0x8000/0x8000";
    let invalid = "-A ufw-before-input -m conntrack --ctstate INVALID -j DROP";
    let marked = "-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP";
    let ban = "-A INPUT -p tcp -m multiport --dports 80,443 -m set --match-set f2b src -j REJECT --reject-with icmp-port-unreachable";
    let web = "-A ufw-user-input -p tcp -m multiport --dports 80,443,8000:8010 -j ACCEPT";
    let input = "-A INPUT -j KUBE-FIREWALL";
    let jump = "-A PREROUTING -m comment";
    let early = "-A ufw-before-input -p tcp -m tcp --dport 80 -j ACCEPT";
    let before = "-A ufw-before-input -i lo -j ACCEPT";
    let null_scan = "-A ufw-before-input -p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE -j DROP";
    let syn_fin = "-A ufw-before-input -p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN -j DROP";
    let raw = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 80 -j CT --notrack\nCOMMIT\n*nat\n";
    let dnat = "iptables table nat: -A KUBE-SVC-WEB -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.244.0.5:8080";
    let policy = "iptables table filter, chain INPUT, its policy";
    for (name, changes, tracking, want) in [
        ("as it is", vec![], USUAL, vec![line(invalid)]),
        ("liberal", vec![], LIBERAL, vec![line(invalid)]),
        ("strict", vec![], STRICT, vec![line(invalid)]),
        ("accepted before", vec![(before, format!("{early}\n{before}"))], STRICT, vec![]),
        ("not tracked", vec![("*nat\n", raw.to_owned())], STRICT, vec![]),
        ("another port not tracked", vec![("*nat\n", raw.replace("80", "81"))], USUAL, vec![line(invalid)]),
        ("only forwarded", vec![(invalid, String::new())], USUAL, vec![]),
        (
            "SYN and FIN",
            vec![(invalid, String::new()), (null_scan, syn_fin.to_owned())],
            LIBERAL,
            vec![line(syn_fin)],
        ),
        (
            "SYN and FIN, not tracked",
            vec![("*nat\n", raw.to_owned()), (null_scan, syn_fin.to_owned())],
            USUAL,
            vec![line(syn_fin)],
        ),
        ("banned clients", vec![(input, format!("{ban}\n{input}"))], USUAL, vec![line(ban), line(invalid)]),
        (
            "not accepted",
            vec![(web, web.replace("80,443,", "443,"))],
            USUAL,
            vec![policy.to_owned(), line(invalid)],
        ),
        ("marked", vec![(jump, format!("{mark}\n{jump}"))], USUAL, vec![line(marked), line(invalid)]),
        (
            "the node port",
            vec![("--dport 30080", "--dport 80".to_owned())],
            USUAL,
            vec![dnat.to_owned(), line(invalid)],
        ),
        (
            "all services",
            vec![("-d 10.96.0.1/32 ", String::new())],
            USUAL,
            vec![dnat.to_owned(), line(invalid)],
        ),
    ] {
        let mut text = IPTABLES.to_owned();
        for (from, to) in changes {
            assert!(text.contains(from), "{name}");
            text = text.replacen(from, &to, 1);
        }
        assert_eq!(places(&iptables::parse(&text, Family::V4, "iptables"), tracking), want, "{name}");
    }
}

#[test]
fn single_options_of_iptables() {
    for (options, want) in [
        ("", true),
        ("-p tcp", true),
        ("! -p tcp", false),
        ("-p udp", false),
        ("-p tcp -m tcp ! --dport 80:90", false),
        ("-p tcp -m tcp --dport 79:80", true),
        ("-i lo", false),
        ("! -i lo", true),
        ("-i eth+", true),
        ("-i wlan+", false),
        ("-d 192.0.2.0/255.255.255.0", true),
        ("! -d 192.0.2.1/32", false),
        ("-s 0.0.0.0/0", true),
        ("-f", false),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", true),
        ("-p tcp -m tcp --tcp-flags SYN,FIN SYN,FIN", true),
        ("-p tcp -m tcp --tcp-flags SYN,RST SYN,RST", false),
        ("-p tcp -m tcp --tcp-flags FIN,ACK FIN", true),
        ("-m conntrack --ctstate INVALID", true),
        ("-p tcp -m tcp --tcp-flags ALL FIN,PSH,URG", false),
        ("-m state --state ESTABLISHED", false),
        ("-m conntrack ! --ctstate NEW", true),
        ("-m conntrack ! --ctstate NEW,INVALID", false),
        ("-m conntrack --ctstate DNAT", true),
        ("-m addrtype --dst-type BROADCAST,MULTICAST", false),
        ("-m rpfilter --invert", true),
        ("-m u32 --u32 \"0x0=0x1\"", true),
        ("-p udp -m string --string \"-j\" --algo bm", false),
    ] {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT {options} -j DROP\nCOMMIT\n");
        let found = !places(&iptables::parse(&text, Family::V4, "iptables"), USUAL).is_empty();
        assert_eq!(found, want, "{options}");
    }
}

#[test]
fn what_nft_says_in_another_way_is_an_error() {
    for text in ["", "{}", r#"{"nftables": 1}"#] {
        assert!(nft::parse(text).is_err(), "{text}");
    }
}

/// Loads what nft reads.
fn load(netns: &Netns, rules: &str) {
    let loaded = netns.enter(|| {
        let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft runs");
        let mut stdin = nft.stdin.take().expect("a pipe");
        io::Write::write_all(&mut stdin, rules.as_bytes()).expect("nft reads");
        drop(stdin);
        nft.wait().expect("nft ends").success()
    });
    assert!(loaded.expect("entered"), "{rules}");
}

#[test]
fn the_real_nft_is_understood() {
    if !have_root() {
        return;
    }
    let scratch = Scratch::new("firewall");
    let netns = scratch.open();
    let found = |tracking: Tracking| {
        for (name, value) in [("loose", tracking.loose), ("be_liberal", tracking.liberal)] {
            let value = if value { "1" } else { "0" };
            scratch.sysctl(&format!("net/netfilter/nf_conntrack_tcp_{name}"), value);
        }
        netns.enter(|| obstacles(&[80])).expect("entered").expect("interfaces")
    };
    let rules = |text: &str| load(&netns, text);
    assert_eq!(found(USUAL), [], "no rules");
    let invalid = "ct state invalid drop";
    let web = "tcp dport { 22, 80, 443 } accept";
    let syn_fin = "tcp flags & (fin|syn) == (fin|syn) drop";
    let usual = "flush ruleset
        table inet filter {
            set banned { type ipv4_addr; flags interval; }
            chain input {
                type filter hook input priority filter; policy drop;
                ct state established,related accept
                ct state invalid drop
                iif lo accept
                meta l4proto { icmp, ipv6-icmp } accept
                tcp flags & (fin|syn) == (fin|syn) drop
                meta nfproto ipv6 fib saddr . iif oif missing drop
                tcp dport { 22, 80, 443 } accept
            }
        }\n";
    rules(usual);
    for (tracking, what, remedy) in [
        (USUAL, "an earlier one", "nf_conntrack_tcp_be_liberal"),
        (LIBERAL, "may drop the copy of a SYN", "notrack"),
        (STRICT, "did not see", "nf_conntrack_tcp_loose"),
    ] {
        let found = found(tracking);
        let [obstacle] = &found[..] else { panic!("{tracking:?}: {found:?}") };
        let is_right = obstacle.what.contains(what) && obstacle.remedy.contains(remedy);
        assert!(is_right && obstacle.place.contains("rule with handle"), "{tracking:?}: {obstacle:?}");
    }
    let raw = "table inet early {
            chain raw { type filter hook prerouting priority raw; tcp dport 80 notrack; }
        }\n";
    rules(&format!("{usual}{raw}"));
    let flags = found(STRICT);
    assert!(flags.len() == 1 && flags[0].what.starts_with("may drop the copy of a SYN"), "{flags:?}");
    rules(&format!("{}{raw}", usual.replace(syn_fin, "")));
    assert_eq!(found(STRICT), [], "exempt from tracking");
    rules(&usual.replace(invalid, web));
    assert_eq!(found(STRICT), [], "accepted before");
    let usual = &usual.replace(invalid, "").replace(syn_fin, "");
    rules(usual);
    assert_eq!(found(STRICT), [], "whatever the state");
    rules(&usual.replace("80, ", ""));
    let closed = found(USUAL);
    assert!(closed.len() == 1 && closed[0].place.ends_with("its policy"), "{closed:?}");
    rules(&usual.replace("iif lo accept", "ip saddr 203.0.113.0/24 drop"));
    let banned = found(USUAL);
    assert!(banned.len() == 1 && banned[0].place.contains("rule with handle"), "{banned:?}");
}

/// What [`Tracking::segments`] says of the kernel.
#[test]
fn tracking_finds_invalid_what_it_is_said_to() {
    if !have_root() {
        return;
    }
    let scratch = Scratch::new("tracking");
    let netns = scratch.open();
    load(
        &netns,
        "table inet t {
            counter invalid { }
            chain input { type filter hook input priority 0; ct state invalid counter name invalid; }
            chain output { type filter hook output priority raw; tcp flags & rst == rst drop; }
        }",
    );
    let set = |name: &str, value: &str| scratch.sysctl(&format!("net/netfilter/nf_conntrack_{name}"), value);
    // The segments have none.
    set("checksum", "0");
    let checked = netns.enter(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = listener.local_addr().expect("an address");
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).expect("a raw socket");
        // How many segments of this kind are invalid.
        let invalid = |from: u16, flags: u8, numbers: &[u32]| {
            let before = count_of_invalid();
            for number in numbers {
                let mut segment = [from.to_be_bytes(), to.port().to_be_bytes()].concat();
                segment.extend([number.to_be_bytes(), number.to_be_bytes()].concat());
                segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
                raw.send_to(&segment, &to.into()).expect("sent");
            }
            count_of_invalid() - before
        };
        assert_eq!(invalid(1001, flag::SYN, &[1]), 0, "SYN");
        assert_eq!(invalid(1002, flag::SYN | flag::FIN, &[1]), 1, "SYN and FIN");
        assert_eq!(invalid(1003, flag::ACK, &[1]), 0, "data, loose");
        set("tcp_loose", "0");
        assert_eq!(invalid(1004, flag::ACK, &[1]), 1, "data, strict");
        set("tcp_loose", "1");

        let client = TcpStream::connect(to).expect("a connection");
        let from = client.local_addr().expect("an address").port();
        let (server, _) = listener.accept().expect("a connection");
        drop(client);
        drop(server);
        // Where its window is, nobody knows: one of two opposite numbers is beyond it.
        let opposite = [0, 1 << 31];
        assert!(invalid(from, flag::ACK, &opposite) > 0, "data behind TIME_WAIT");
        assert_eq!(invalid(from, flag::SYN | flag::FIN, &opposite), 2, "SYN and FIN behind TIME_WAIT");
        set("tcp_be_liberal", "1");
        assert_eq!(invalid(from, flag::ACK, &opposite), 0, "data behind TIME_WAIT, liberal");
        assert_eq!(invalid(from, flag::SYN | flag::FIN, &opposite), 2, "SYN and FIN, liberal");
    });
    checked.expect("entered");
}

/// What the counter `invalid` says in the network namespace of the calling thread.
fn count_of_invalid() -> u64 {
    let text = run("nft", &["--json", "list", "counters"]).expect("nft runs").expect("nft is there");
    let ruleset: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let counters = ruleset["nftables"].as_array().expect("a list").iter();
    counters.filter_map(|object| object["counter"]["packets"].as_u64()).sum()
}
