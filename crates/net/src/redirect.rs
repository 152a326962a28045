//! Everything that comes in on one interface goes out of another, and back: how a tap takes an interface's place
//! without the interface being changed.
//!
//! ```text
//!  interface --ingress--> u32, matches all --mirred--> egress of the tap --> who holds the tap
//!  interface <--egress---        mirred <-- u32, matches all <--ingress-- tap
//! ```
//!
//! The queueing discipline `ingress` sees a frame before any protocol does, so the namespace's kernel hears nothing;
//! packet sockets do. A redirect to an interface that is down, or gone, drops: its source is then silenced. An
//! ingress discipline is ours when each of its filters bears our cookie; others' are left as they are.

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType,
    TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use crate::error::NetError;
use crate::view::LIMIT;

/// On each of our actions: how a later process knows them. The kernel keeps at most 16 bytes.
const COOKIE: &[u8] = b"dunlin";
/// The handle `ffff:` of every ingress discipline.
const INGRESS_HANDLE: u32 = 0xffff_0000;
const PRIORITY: u16 = 1;

/// Connects an interface and a tap of the handle's namespace, both by index. What is left of an earlier connection of
/// the interface goes first. Refused when the interface has an ingress discipline of somebody else's.
pub async fn connect(handle: &Handle, interface: u32, tap: u32) -> Result<(), NetError> {
    within("connect an interface and a tap", async {
        remove(handle, interface).await?;
        // This way first: a tap that is down drops, and from here on the namespace is silent.
        send(handle, interface, tap).await?;
        send(handle, tap, interface).await
    })
    .await
}

/// Takes our ingress discipline off an interface, which hears again. One that has none, or another's, stays as it is.
pub async fn disconnect(handle: &Handle, interface: u32) -> Result<(), NetError> {
    within("disconnect an interface", async {
        match remove(handle, interface).await {
            Ok(()) | Err(NetError::Foreign { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    })
    .await
}

/// Whether an interface's incoming frames are redirected by us, alive or left over.
pub async fn connected(handle: &Handle, interface: u32) -> Result<bool, NetError> {
    within("look at an interface's filters", async { Ok(owner(handle, interface).await? == Owner::Dunlin) })
        .await
}

async fn within<T>(action: &str, work: impl Future<Output = Result<T, NetError>>) -> Result<T, NetError> {
    let late = |_| NetError::Late { action: action.to_owned(), limit: LIMIT };
    tokio::time::timeout(LIMIT, work).await.map_err(late)?
}

/// Whose an interface's ingress discipline is.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// There is none.
    Nobody,
    /// Ours, or an empty one, which changes nothing for anybody.
    Dunlin,
    Other {
        what: String,
    },
}

async fn remove(handle: &Handle, interface: u32) -> Result<(), NetError> {
    match owner(handle, interface).await? {
        Owner::Nobody => Ok(()),
        Owner::Other { what } => Err(NetError::Foreign { interface, what }),
        Owner::Dunlin => {
            let mut request = handle.qdisc().del(signed(interface));
            let header = &mut request.message_mut().header;
            header.parent = TcHandle::INGRESS;
            header.handle = TcHandle::from(INGRESS_HANDLE);
            let action = format!("remove the ingress discipline of interface {interface}");
            request.execute().await.map_err(NetError::asked(action))
        }
    }
}

async fn owner(handle: &Handle, interface: u32) -> Result<Owner, NetError> {
    let disciplines: Vec<TcMessage> = handle
        .qdisc()
        .get()
        .index(signed(interface))
        .execute()
        .try_collect()
        .await
        .map_err(NetError::asked(format!("list the disciplines of interface {interface}")))?;
    // The kernel may answer with those of every interface.
    let present = disciplines
        .iter()
        .find(|found| found.header.index == signed(interface) && found.header.parent == TcHandle::INGRESS);
    let Some(present) = present else { return Ok(Owner::Nobody) };
    if kind(present) != "ingress" {
        return Ok(Owner::Other { what: format!("the discipline {}", kind(present)) });
    }
    let filters: Vec<TcMessage> = handle
        .traffic_filter(signed(interface))
        .get()
        .ingress()
        .execute()
        .try_collect()
        .await
        .map_err(NetError::asked(format!("list the filters of interface {interface}")))?;
    // A u32 filter's hash tables are listed too, and have no actions.
    let foreign = filters.iter().find(|filter| {
        let actions = actions(filter);
        (kind(filter) != "u32" || !actions.is_empty()) && !actions.iter().any(|action| is_ours(action))
    });
    Ok(match foreign {
        Some(filter) => Owner::Other { what: format!("an ingress filter ({})", kind(filter)) },
        None => Owner::Dunlin,
    })
}

fn kind(message: &TcMessage) -> &str {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Kind(kind) => Some(kind.as_str()),
            _ => None,
        })
        .unwrap_or_default()
}

fn actions(filter: &TcMessage) -> Vec<&TcAction> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options
        .flatten()
        .filter_map(|option| match option {
            TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
            _ => None,
        })
        .flatten()
        .collect()
}

fn is_ours(action: &TcAction) -> bool {
    action
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, TcActionAttribute::Cookie(cookie) if cookie == COOKIE))
}

/// All that comes in on `from` goes out of `to`.
async fn send(handle: &Handle, from: u32, to: u32) -> Result<(), NetError> {
    let added = handle.qdisc().add(signed(from)).ingress().execute().await;
    added.map_err(NetError::asked(format!("add an ingress discipline to interface {from}")))?;
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut redirect = TcAction::default();
    redirect.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
        TcActionAttribute::Cookie(COOKIE.to_vec()),
    ];
    // One key whose mask is empty matches everything.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let action = format!("redirect interface {from} to {to}");
    let options = [TcFilterU32Option::Selector(selector), TcFilterU32Option::Action(vec![redirect])];
    let every_protocol = u16::to_be(3);
    let request = handle
        .traffic_filter(signed(from))
        .add()
        .parent(INGRESS_HANDLE)
        .priority(PRIORITY)
        .protocol(every_protocol)
        .u32(&options)
        .map_err(NetError::asked(action.clone()))?;
    request.execute().await.map_err(NetError::asked(action))
}

/// As `tcmsg` has it.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}
