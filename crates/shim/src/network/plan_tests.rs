use super::*;

fn interface(name: &str, index: u32, addresses: &[&str]) -> Interface {
    Interface {
        name: name.into(),
        index,
        mac: [2, 0, 0, 0, 0, u8::try_from(index).unwrap()],
        mtu: 1500,
        kind: Some("veth".into()),
        up: true,
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    }
}

fn saved(name: &str, addresses: &[&str]) -> SavedEndpoint {
    endpoint(&interface(name, 1, addresses), RootPort::new(0).unwrap())
}

#[test]
fn the_loopback_what_is_down_and_our_taps_are_no_nics() {
    let all = vec![
        interface("eth0", 2, &[]),
        interface("lo", 1, &[]),
        Interface { up: false, ..interface("eth1", 3, &[]) },
        Interface { kind: Some("tun".into()), ..interface("dunlin2", 4, &[]) },
        Interface { mac: [0; 6], ..interface("tun0", 5, &[]) },
        interface("net1", 6, &[]),
    ];
    let names: Vec<String> = usable(all).into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["eth0", "net1"]);
}

#[test]
fn ports_are_given_from_the_first_and_too_few_are_told_with_both_numbers() {
    let two = [interface("eth0", 1, &[]), interface("net1", 2, &[])];
    let ports = |taken: &[u8]| super::ports(&two, &taken.iter().copied().collect());
    let numbers: Vec<u8> = ports(&[0, 2]).unwrap().iter().map(|port| port.index()).collect();
    assert_eq!(numbers, [1, 3]);
    let error = ports(&[0, 1, 3]).unwrap_err().to_string();
    assert!(error.contains("2 interfaces (eth0, net1)") && error.contains("1 of its 4 ports"), "{error}");
}

#[test]
fn a_nic_meets_the_interface_of_its_name_or_the_only_one() {
    let keep = |saved: &[(&str, &str)], here: &[Interface]| {
        let saved =
            saved.iter().map(|(name, at)| ((*name).to_owned(), super::tests::saved(name, &[at]))).collect();
        pairs(&saved, here, "/run/netns/p", Contract::Keep)
    };
    let (a, b) = ("10.0.0.2/24", "fd00::2/64");
    let found = keep(&[("eth0", a), ("net1", b)], &[interface("net1", 7, &[b]), interface("eth0", 8, &[a])]);
    let found: Vec<u32> = found.unwrap().values().map(|one| one.index).collect();
    assert_eq!(found, [8, 7]);
    let found = keep(&[("eth0", a)], &[interface("ens3", 5, &[a])]).unwrap();
    assert_eq!(found["eth0"].index, 5, "one to one");
    let error =
        keep(&[("eth0", a)], &[interface("x", 5, &[a]), interface("y", 6, &[])]).unwrap_err().to_string();
    assert!(error.contains("eth0") && error.contains("x, y") && error.contains("10.0.0.2/24"), "{error}");
    let error = keep(&[("eth0", a)], &[]).unwrap_err().to_string();
    assert!(error.contains("but none"), "{error}");
}

#[test]
fn other_addresses_are_refused_with_both_lists_unless_they_are_taken_over() {
    let saved = BTreeMap::from([("n".to_owned(), saved("eth0", &["10.0.0.2/24", "fd00::2/64"]))]);
    let with = |addresses: &[&str], contract| {
        pairs(&saved, &[interface("eth0", 3, addresses)], "/run/netns/p", contract)
    };
    with(&["fd00::2/64", "10.0.0.2/24"], Contract::Keep).unwrap();
    let error = with(&["10.0.0.3/24"], Contract::Keep).unwrap_err().to_string();
    for part in ["eth0", "10.0.0.2/24, fd00::2/64", "10.0.0.3/24", "/run/netns/p", "--network rebind"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(with(&[], Contract::Keep).unwrap_err().to_string().contains("has none"));
    with(&["10.0.0.3/24"], Contract::Rebind).unwrap();
    let narrow = Interface { mtu: 1400, ..interface("eth0", 3, &["10.0.0.2/24", "fd00::2/64"]) };
    let error = pairs(&saved, &[narrow], "/p", Contract::Keep).unwrap_err().to_string();
    assert!(error.contains("1500") && error.contains("1400"), "{error}");
}

#[test]
fn another_gateway_is_refused_and_more_routes_than_the_guest_has_are_not() {
    let route = |destination: &str, gateway: [u8; 4]| Route {
        destination: destination.parse().unwrap(),
        gateway: Some(gateway.into()),
        source: None,
        metric: 0,
        on_link: false,
    };
    let own = || Interface {
        routes: vec![route("0.0.0.0/0", [10, 0, 0, 1])],
        ..interface("eth0", 1, &["10.0.0.2/24"])
    };
    let saved = BTreeMap::from([("n".to_owned(), endpoint(&own(), RootPort::new(0).unwrap()))]);
    let with = |routes: Vec<Route>, contract| {
        pairs(&saved, &[Interface { routes, ..own() }], "/run/netns/p", contract)
    };
    let more = route("10.9.0.0/16", [10, 0, 0, 7]);
    with(vec![more.clone(), own().routes[0].clone()], Contract::Keep).unwrap();
    let error = with(vec![route("0.0.0.0/0", [10, 0, 0, 254])], Contract::Keep).unwrap_err().to_string();
    for part in ["eth0", "default by 10.0.0.1", "default by 10.0.0.254", "/run/netns/p", "--network rebind"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(with(Vec::new(), Contract::Keep).unwrap_err().to_string().contains("has none"));
    with(Vec::new(), Contract::Rebind).unwrap();
}

#[test]
fn what_is_rebound_keeps_its_card_and_name() {
    let nic = saved("eth0", &["10.0.0.2/24"]);
    let here = Interface { mtu: 1400, ..interface("ens9", 9, &["10.5.0.2/24"]) };
    let nic = rebound(&nic, &here);
    assert_eq!((nic.mac.as_str(), nic.name.as_str(), nic.root_port), ("02:00:00:00:00:01", "eth0", 0));
    assert_eq!((nic.mtu, &nic.addresses), (1400, &here.addresses));
}

#[test]
fn only_a_guest_of_ours_is_told_what_only_it_knows() {
    let nic = SavedEndpoint {
        routes: vec![SavedRoute {
            destination: "0.0.0.0/0".parse().unwrap(),
            gateway: Some([10, 0, 0, 1].into()),
            source: Some([10, 0, 0, 2].into()),
            metric: 7,
            on_link: true,
        }],
        neighbours: vec![([10, 0, 0, 1].into(), "02:00:00:00:00:09".into())],
        ..saved("eth0", &["10.0.0.2/24"])
    };
    let ours = adapter("pod", "id", &nic, true);
    assert_eq!((ours.dunlin_name.as_str(), ours.dunlin_mtu, ours.dunlin_neighbors.len()), ("eth0", 1500, 1));
    assert_eq!((ours.routes[0].dunlin_source.as_str(), ours.routes[0].dunlin_on_link), ("10.0.0.2", true));
    let other = serde_json::to_string(&adapter("pod", "id", &nic, false)).unwrap();
    assert!(!other.contains("Dunlin") && other.contains("\"NextHop\":\"10.0.0.1\""), "{other}");
}

#[test]
fn an_annotation_that_says_neither_is_refused() {
    assert_eq!(Contract::read(None), Some(Contract::Keep));
    assert_eq!(Contract::read(Some("keep")), Some(Contract::Keep));
    assert_eq!(Contract::read(Some("rebind")), Some(Contract::Rebind));
    assert_eq!(Contract::read(Some("Rebind")), None);
}
