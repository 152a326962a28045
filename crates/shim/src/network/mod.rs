//! A pod's network, as far as it is bookkeeping: the namespace that containerd names, and the NICs that the
//! guest has in it. The work is done in [`wire`]; what is to be done is found in [`plan`].
//!
//! | state         | setup      | teardown | fail    | save |
//! |---------------|------------|----------|---------|------|
//! | NotConfigured | Configured | =        | Invalid | =    |
//! | Configured    | -          | TornDown | Invalid | =    |
//! | Invalid       | -          | TornDown | =       | -    |
//! | TornDown      | -          | =        | -       | =    |
//!
//! The guest's name of the namespace is fixed at its first set-up; a destination patches only its own
//! path beside it, and what a rebound NIC has here. `resume` of a patched network lists the NICs of which the guest has
//! to be told, once.

pub(crate) mod error;
pub(crate) mod plan;
pub(crate) mod wire;

use std::collections::{BTreeMap, BTreeSet};

use dunlin_wire::tree::{NetworkStage, SavedEndpoint, SavedNetwork};

use crate::controller::{NotNow, Transitions};
use crate::hold::{Hold, Step};

/// Where a network stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum State {
    #[default]
    NotConfigured,
    Configured,
    Invalid,
    TornDown,
}

/// What changes a network's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Setup,
    Teardown,
    Fail,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] = &[
        ("NotConfigured", State::NotConfigured),
        ("Configured", State::Configured),
        ("Invalid", State::Invalid),
        ("TornDown", State::TornDown),
    ];
    const OPS: &'static [(&'static str, Op)] =
        &[("setup", Op::Setup), ("teardown", Op::Teardown), ("fail", Op::Fail), ("save", Op::Save)];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::NotConfigured, Op::Setup) => Some(State::Configured),
            (State::NotConfigured, Op::Teardown) => Some(State::NotConfigured),
            (_, Op::Teardown) => Some(State::TornDown),
            (State::NotConfigured | State::Configured | State::Invalid, Op::Fail) => Some(State::Invalid),
            (State::NotConfigured | State::Configured | State::TornDown, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Network {
    state: State,
    pub(crate) hold: Hold,
    /// The guest's name of the namespace.
    namespace_id: String,
    /// The namespace on this host; None: the machine's pods have no network of the host's.
    path: Option<String>,
    policy_based_routing: bool,
    /// By NIC id.
    endpoints: BTreeMap<String, SavedEndpoint>,
    /// NICs of which the guest has to be told what they have here.
    rebound: BTreeSet<String>,
}

const WHAT: &str = "the pod's network";

impl Network {
    /// Takes note of the namespace that a pod's sandbox names; none: nothing is set up.
    pub(crate) fn setup(&mut self, guest_pod: &str, path: Option<String>) -> Result<(), NotNow> {
        if path.is_none() {
            return Ok(());
        }
        self.state.enter(Op::Setup, WHAT)?;
        guest_pod.clone_into(&mut self.namespace_id);
        self.path = path;
        Ok(())
    }

    /// The NICs that were connected.
    pub(crate) fn connected(&mut self, endpoints: BTreeMap<String, SavedEndpoint>) {
        self.endpoints = endpoints;
    }

    /// The NICs by their ids.
    pub(crate) fn endpoints(&self) -> &BTreeMap<String, SavedEndpoint> {
        &self.endpoints
    }

    /// The guest's name of the namespace.
    pub(crate) fn namespace_id(&self) -> &str {
        &self.namespace_id
    }

    /// Something of it cannot be had.
    pub(crate) fn fail(&mut self) {
        // What is torn down has failed before.
        let _ = self.state.enter(Op::Fail, WHAT);
    }

    /// Forgets the NICs. Repeats do nothing.
    pub(crate) fn teardown(&mut self) {
        // Allowed in every state.
        let _ = self.state.enter(Op::Teardown, WHAT);
        self.endpoints.clear();
        self.path = None;
    }

    /// Whether it could be saved now. Changes nothing.
    pub(crate) fn check_save(&self) -> Result<(), NotNow> {
        let (mut state, mut hold) = (self.state, self.hold);
        state.enter(Op::Save, WHAT)?;
        hold.enter(Step::Save, WHAT)
    }

    /// What goes along; None: there never was a network.
    pub(crate) fn save(&self) -> Option<SavedNetwork> {
        let stage = match self.state {
            State::NotConfigured => return None,
            State::Configured => NetworkStage::Configured,
            State::Invalid => NetworkStage::Invalid,
            State::TornDown => NetworkStage::TornDown,
        };
        Some(SavedNetwork {
            namespace_id: self.namespace_id.clone(),
            policy_based_routing: self.policy_based_routing,
            namespace_supported: true,
            stage,
            endpoints: self.endpoints.clone(),
        })
    }

    /// A destination's, inert.
    pub(crate) fn import(saved: Option<&SavedNetwork>) -> Network {
        let Some(saved) = saved else { return Network { hold: Hold::Imported, ..Network::default() } };
        Network {
            state: match saved.stage {
                NetworkStage::NotConfigured => State::NotConfigured,
                NetworkStage::Configured => State::Configured,
                NetworkStage::Invalid => State::Invalid,
                NetworkStage::TornDown => State::TornDown,
            },
            hold: Hold::Imported,
            namespace_id: saved.namespace_id.clone(),
            path: None,
            policy_based_routing: saved.policy_based_routing,
            endpoints: saved.endpoints.clone(),
            rebound: BTreeSet::new(),
        }
    }

    /// The destination's namespace, and the NICs as they are here.
    pub(crate) fn patch(
        &mut self,
        path: Option<String>,
        endpoints: BTreeMap<String, SavedEndpoint>,
    ) -> Result<(), NotNow> {
        self.hold.enter(Step::Patch, WHAT)?;
        self.path = path;
        let differs = |(id, endpoint): &(&String, &SavedEndpoint)| self.endpoints.get(*id) != Some(*endpoint);
        self.rebound = endpoints.iter().filter(differs).map(|(id, _)| id.clone()).collect();
        self.endpoints = endpoints;
        Ok(())
    }

    /// Frees it. Gives the NICs that have other addresses than on the source, the first time.
    pub(crate) fn resume(&mut self) -> BTreeMap<String, SavedEndpoint> {
        self.hold = Hold::Free;
        let rebound = std::mem::take(&mut self.rebound);
        rebound.into_iter().filter_map(|id| Some((id.clone(), self.endpoints.get(&id)?.clone()))).collect()
    }

    /// It never runs here.
    pub(crate) fn abort(&mut self) {
        if self.hold.arriving() {
            self.hold = Hold::Free;
            self.teardown();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("mod.rs"));
    }

    fn nic(address: &str) -> SavedEndpoint {
        SavedEndpoint {
            endpoint_id: "e".into(),
            mac: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            root_port: 0,
            mtu: 1500,
            addresses: vec![address.parse().unwrap()],
            routes: Vec::new(),
            neighbours: Vec::new(),
        }
    }

    fn with_nic() -> Network {
        let mut network = Network::default();
        network.setup("pod", Some("/run/netns/a".into())).unwrap();
        network.connected([("nic".to_owned(), nic("10.0.0.2/24"))].into());
        network
    }

    #[test]
    fn a_network_travels_and_the_guest_keeps_what_it_has() {
        let network = with_nic();
        network.check_save().unwrap();
        let mut there = Network::import(network.save().as_ref());
        assert!(there.check_save().is_err(), "an imported one is nobody's to save");
        let endpoints = there.endpoints().clone();
        there.patch(Some("/run/netns/b".into()), endpoints.clone()).unwrap();
        assert!(there.patch(None, endpoints).is_err());
        assert!(there.resume().is_empty());
        assert_eq!(there.save(), network.save());
    }

    #[test]
    fn a_guest_is_told_once_of_what_was_rebound() {
        let mut there = Network::import(with_nic().save().as_ref());
        let here = nic("10.5.0.2/24");
        there.patch(Some("/run/netns/b".into()), [("nic".to_owned(), here.clone())].into()).unwrap();
        assert_eq!(there.resume(), [("nic".to_owned(), here.clone())].into());
        assert!(there.resume().is_empty());
        assert_eq!(there.save().unwrap().endpoints["nic"], here, "and goes on with it");
    }

    #[test]
    fn a_network_that_failed_is_not_saved() {
        let mut network = with_nic();
        network.fail();
        assert!(network.check_save().is_err());
        network.teardown();
        network.check_save().unwrap();
        assert!(network.endpoints().is_empty());
    }

    #[test]
    fn an_aborted_import_is_torn_down_and_a_source_stays() {
        let mut there = Network::import(with_nic().save().as_ref());
        there.abort();
        assert_eq!(there.state, State::TornDown);
        let mut here = with_nic();
        here.hold.enter(Step::Save, WHAT).unwrap();
        here.abort();
        assert_eq!((here.state, here.hold), (State::Configured, Hold::Source));
    }
}
