use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn config(read_only: bool, names: &[&str]) -> Config {
    let allowed = (!names.is_empty()).then(|| names.iter().map(|name| (*name).to_owned()).collect());
    Config { read_only, allowed }
}

fn holder(container: &str) -> Holder {
    Holder {
        container: container.into(),
        source: "/srv/./data".into(),
        destination: "/data".into(),
        why: "it is writable".into(),
    }
}

/// A table with one share, served and mounted.
fn shared() -> (Plan9, ReservationId) {
    let mut plan9 = Plan9::default();
    let (id, _) = plan9.reserve("/srv/data", &config(true, &[]), holder("web")).unwrap();
    plan9.add(&id).unwrap();
    assert_eq!(plan9.map(&id).unwrap(), "/run/mounts/plan9/0");
    (plan9, id)
}

#[test]
fn one_directory_is_one_share_until_its_last_user_is_gone() {
    let (mut plan9, one) = shared();
    let (two, wider) = plan9.reserve("/srv/data", &config(false, &[]), holder("db")).unwrap();
    assert_eq!(wider, config(false, &[]), "writable from now on");
    plan9.map(&two).unwrap();
    assert_eq!(plan9.share(&two).unwrap().1.mount.as_ref().unwrap().ref_count, 2);
    assert!(!plan9.unmap(&one).unwrap());
    assert_eq!(plan9.release(&one).unwrap(), None);
    assert!(plan9.unmap(&two).unwrap());
    assert_eq!(plan9.release(&two).unwrap().as_deref(), Some("/srv/data"));
    assert!(matches!(plan9.release(&two), Err(Plan9Error::Unknown(_))));
    // Names are not used again: the guest may still know the old one.
    let (three, _) = plan9.reserve("/srv/data", &config(true, &[]), holder("web")).unwrap();
    assert_eq!(plan9.share(&three).unwrap().1.name, "1");
}

#[test]
fn a_writable_share_is_refused_where_the_policy_has_none() {
    let mut plan9 = Plan9::default();
    plan9.forbid_writing();
    let error = plan9.reserve("/srv", &config(false, &[]), holder("web")).unwrap_err().to_string();
    assert!(error.contains("/srv/./data") && error.contains("/data") && error.contains("`ro`"), "{error}");
    let (id, _) = plan9.reserve("/srv", &config(true, &[]), holder("web")).unwrap();
    plan9.add(&id).unwrap();
    plan9.map(&id).unwrap();
    assert!(plan9.share(&id).unwrap().1.mount.as_ref().unwrap().read_only);
}

#[test]
fn a_broken_share_takes_nobody_in() {
    let (mut plan9, id) = shared();
    plan9.fail(&id);
    let error = plan9.reserve("/srv/data", &config(true, &[]), holder("db")).unwrap_err();
    assert!(error.to_string().contains("/srv/data") && error.to_string().contains("Invalid"), "{error}");
    assert!(plan9.unmap(&id).unwrap(), "the guest may have it mounted");
    assert!(plan9.release(&id).unwrap().is_some());
    plan9.reserve("/srv/data", &config(true, &[]), holder("db")).unwrap();
}

#[test]
fn a_share_ties_the_sandbox_to_this_host_by_name() {
    let (mut plan9, id) = shared();
    let tie = plan9.check_migratable().unwrap_err();
    let named = Tie::Mount {
        container: "web".into(),
        host: "/srv/./data".into(),
        destination: "/data".into(),
        why: "it is writable".into(),
    };
    assert_eq!(tie, named);
    let text = tie.to_string();
    assert!(text.contains("web") && text.contains("/srv/./data") && text.contains(" /data "), "{text}");
    plan9.unmap(&id).unwrap();
    plan9.release(&id).unwrap();
    plan9.check_migratable().unwrap();
}

#[test]
fn a_saved_table_is_frozen_and_comes_back() {
    let (mut plan9, id) = shared();
    let saved = plan9.save().unwrap();
    assert_eq!(plan9.save().unwrap(), saved, "save may be repeated");
    assert!(matches!(plan9.reserve("/x", &config(true, &[]), holder("c")), Err(Plan9Error::NotNow(_))));
    assert!(matches!(plan9.release(&id), Err(Plan9Error::NotNow(_))));
    plan9.abort().unwrap();
    plan9.resume().unwrap();
    plan9.resume().unwrap();
    assert_eq!(plan9.share(&id).unwrap().1.stage, share::State::Added, "the source goes on as it was");
    plan9.reserve("/x", &config(true, &[]), holder("c")).unwrap();
}

#[test]
fn an_imported_table_is_what_was_saved_and_inert() {
    let (mut plan9, id) = shared();
    plan9.reserve("/etc/conf", &config(true, &["one", "two"]), holder("web")).unwrap();
    let saved = plan9.save().unwrap();
    let mut there = Plan9::import(saved.clone()).unwrap();
    assert_eq!(there.table, saved);
    assert!(there.reserve("/x", &config(true, &[]), holder("c")).is_err());
    assert!(there.resume().is_err(), "it was not patched");
    let pairs = |from: &str, to: &str| BTreeMap::from([(from.to_owned(), to.to_owned())]);
    there.patch(&pairs("/srv/data", "/mnt/data")).unwrap();
    assert!(matches!(there.patch(&pairs("/srv/data", "/y")), Err(Plan9Error::Unknown(_))));
    let taken = there.patch(&pairs("/etc/conf", "/mnt/data"));
    assert!(matches!(taken, Err(Plan9Error::Unknown(_))), "{taken:?}");
    there.resume().unwrap();
    let (path, share) = there.share(&id).unwrap();
    assert_eq!((path, share.stage), ("/mnt/data", share::State::Invalid), "its server is on the source");
    assert_eq!(share.mount.as_ref().unwrap().stage, mount::State::Invalid);
    assert!(matches!(there.check_migratable(), Err(Tie::Share { .. })), "whose it was is not saved");
    assert!(there.unmap(&id).unwrap());
    assert!(there.release(&id).unwrap().is_some());
}

#[test]
fn an_abort_ends_what_was_imported() {
    let (mut plan9, id) = shared();
    let mut there = Plan9::import(plan9.save().unwrap()).unwrap();
    there.patch(&BTreeMap::new()).unwrap();
    there.abort().unwrap();
    there.abort().unwrap();
    assert_eq!(there.share(&id).unwrap().1.stage, share::State::Removed);
    assert!(!there.unmap(&id).unwrap(), "there is no guest to ask");
    assert!(there.release(&id).unwrap().is_some());
    there.check_migratable().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// By whatever way the table got where it is.
    #[test]
    fn a_table_comes_back_as_it_was_saved(
        forbidden in any::<bool>(),
        steps in vec((0..6u8, any::<Index>(), 0..3u8, any::<bool>()), 0..40),
    ) {
        let mut plan9 = Plan9::default();
        if forbidden {
            plan9.forbid_writing();
        }
        for (step, at, number, flag) in steps {
            let used: Vec<ReservationId> = plan9.table.reservations.keys().cloned().collect();
            if step == 0 || used.is_empty() {
                let names: &[&str] = if number == 0 { &["hosts"] } else { &[] };
                // Refused where nothing may be written to, or the share is broken.
                let _ = plan9.reserve(&format!("/srv/{number}"), &config(flag, names), holder("web"));
                continue;
            }
            let id = at.get(&used);
            // What has no place in the share's state changes nothing.
            match step {
                1 => drop(plan9.add(id)),
                2 => drop(plan9.map(id)),
                3 => drop(plan9.unmap(id)),
                4 if flag => plan9.fail(id),
                _ => drop(plan9.release(id)),
            }
        }
        let saved = plan9.save().unwrap();
        prop_assert_eq!(&plan9.save().unwrap(), &saved);
        let mut there = Plan9::import(saved.clone()).unwrap();
        prop_assert_eq!(&there.table, &saved);
        prop_assert!(there.save().is_err() && there.reserve("/x", &config(true, &[]), holder("c")).is_err());
        for id in saved.reservations.keys() {
            prop_assert_eq!(there.share(id).unwrap(), plan9.share(id).unwrap());
        }
        plan9.resume().unwrap();
        prop_assert_eq!(plan9.save().unwrap(), saved);
    }
}
