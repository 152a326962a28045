use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn device(text: &str) -> HostDevice {
    HostDevice::parse(text).unwrap()
}

/// A table with one device that the guest has.
fn with_one() -> (Vpci, String) {
    let mut vpci = Vpci::default();
    let id = vpci.reserve(&device("0000:03:00.0"), "web", &BTreeSet::new()).unwrap();
    vpci.enter(&id, Op::Assign).unwrap();
    vpci.enter(&id, Op::Ready).unwrap();
    (vpci, id)
}

#[test]
fn ports_are_taken_from_the_last_and_given_back() {
    let (mut vpci, first) = with_one();
    assert_eq!(vpci.device(&first).unwrap().1.unwrap().index(), 3);
    let taken = BTreeSet::from([0, 2]);
    let second = vpci.reserve(&device("0000:04:00.0"), "web", &taken).unwrap();
    assert_eq!(vpci.device(&second).unwrap().1.unwrap().index(), 1);
    let error = vpci.reserve(&device("0000:05:00.0/2"), "web", &taken).unwrap_err();
    assert!(error.to_string().contains("0000:05:00.0/2"), "{error}");
    assert!(vpci.release(&first, "web").unwrap());
    vpci.remove(&first).unwrap();
    let third = vpci.reserve(&device("0000:05:00.0"), "web", &taken).unwrap();
    assert_eq!(vpci.device(&third).unwrap().1.unwrap().index(), 3);
}

#[test]
fn two_containers_use_one_device() {
    let (mut vpci, id) = with_one();
    assert_eq!(vpci.reserve(&device("0000:03:00.0"), "db", &BTreeSet::new()).unwrap(), id);
    assert_eq!(vpci.device(&id).unwrap().0.ref_count, 2);
    assert!(!vpci.release(&id, "web").unwrap());
    assert_eq!(
        vpci.check_migratable().unwrap_err(),
        Tie::Device { container: "db".into(), id: "0000:03:00.0".into() }
    );
    assert!(vpci.release(&id, "db").unwrap());
    assert_eq!(vpci.check_migratable().unwrap_err(), Tie::Left { id: "0000:03:00.0".into() });
    vpci.remove(&id).unwrap();
    vpci.check_migratable().unwrap();
}

#[test]
fn a_broken_device_takes_nobody_in() {
    let (mut vpci, id) = with_one();
    vpci.enter(&id, Op::Fail).unwrap();
    let error = vpci.reserve(&device("0000:03:00.0"), "db", &BTreeSet::new()).unwrap_err().to_string();
    assert!(error.contains("0000:03:00.0") && error.contains("AssignedInvalid"), "{error}");
    assert_eq!(vpci.device(&id).unwrap().0.ref_count, 1);
}

#[test]
fn a_saved_table_is_frozen_and_an_imported_one_inert() {
    let (mut vpci, id) = with_one();
    vpci.reserve(&device("0000:05:00.0/2"), "web", &BTreeSet::new()).unwrap();
    let saved = vpci.save().unwrap();
    assert_eq!(vpci.save().unwrap(), saved);
    assert!(matches!(vpci.release(&id, "web"), Err(VpciError::NotNow(_))));

    let mut there = Vpci::import(saved.clone()).unwrap();
    assert_eq!(there.table, saved);
    assert!(
        there.resume().is_err() && there.reserve(&device("0000:07:00.0"), "c", &BTreeSet::new()).is_err()
    );
    let unknown = BTreeMap::from([("none".to_owned(), device("0000:08:00.0"))]);
    assert!(matches!(there.patch(&unknown), Err(VpciError::Unknown(_))));
    there.patch(&BTreeMap::from([(id.clone(), device("0000:08:00.0"))])).unwrap();
    there.resume().unwrap();
    let (arrived, port) = there.device(&id).unwrap();
    assert_eq!(
        (arrived.instance_id.as_str(), arrived.stage, port),
        ("0000:08:00.0", State::AssignedInvalid, None)
    );
    assert!(there.release(&id, "web").unwrap());
    there.remove(&id).unwrap();

    vpci.abort().unwrap();
    vpci.resume().unwrap();
    assert_eq!(vpci.device(&id).unwrap().0.stage, State::Ready, "the source goes on as it was");

    let mut given_up = Vpci::import(saved).unwrap();
    given_up.abort().unwrap();
    given_up.abort().unwrap();
    assert_eq!(given_up.device(&id).unwrap().0.stage, State::Removed);
    given_up.remove(&id).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// By whatever way the table got where it is.
    #[test]
    fn a_table_comes_back_as_it_was_saved(steps in vec((0..6u8, any::<Index>(), 0..6u8), 0..40)) {
        let mut vpci = Vpci::default();
        for (step, at, number) in steps {
            let there: Vec<String> = vpci.table.devices.keys().cloned().collect();
            if step == 0 || there.is_empty() {
                let function = if number % 2 == 0 { "" } else { "/1" };
                let device = device(&format!("0000:0{}:00.0{function}", number / 2));
                // Refused when no port is free, or the device is broken.
                let _ = vpci.reserve(&device, "web", &BTreeSet::new());
                continue;
            }
            let id = at.get(&there);
            // What has no place in the device's state changes nothing.
            match step {
                1 => drop(vpci.enter(id, Op::Assign)),
                2 => drop(vpci.enter(id, Op::Ready)),
                3 if number == 0 => drop(vpci.enter(id, Op::Fail)),
                _ if vpci.device(id).unwrap().0.ref_count == 0 => vpci.remove(id).unwrap(),
                _ => drop(vpci.release(id, "web")),
            }
        }
        let saved = vpci.save().unwrap();
        prop_assert_eq!(&vpci.save().unwrap(), &saved);
        let mut there = Vpci::import(saved.clone()).unwrap();
        prop_assert_eq!(&there.table, &saved);
        prop_assert!(there.save().is_err());
        vpci.resume().unwrap();
        prop_assert_eq!(vpci.save().unwrap(), saved);
    }
}
