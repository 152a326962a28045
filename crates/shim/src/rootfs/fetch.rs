//! Images that this host makes with other bytes than the source: read from the source by digest.
//!
//! ```text
//!  <hex>.partial, as long as what came <- chunks of 1 MiB ... whole: hashed -> synced, read-only -> renamed
//!                                         or "so many zeros", which become a hole
//! ```
//!
//! A fetch that breaks off leaves its partial file, and the next one goes on behind it; who fetches holds the
//! image's lock. Nothing is served before the whole of it has the digest that it is named for.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dunlin_wire::images::ReadRequest;
use dunlin_wire::images_ttrpc::ImagesClient;

use super::RootfsError;
use super::digest::Scheme;
use super::store::{Image, Store};

/// What is asked for at once, bytes.
const CHUNK: u32 = 1 << 20;
/// One chunk, over two nodes.
const READ_NANOS: i64 = 90_000_000_000;

/// Where images can be read by digest.
pub(crate) trait Source {
    /// What stands from `offset` on, with up to `length` bytes of data; or why not.
    async fn read(&self, digest: &str, offset: u64, length: u32) -> Result<Piece, String>;
}

/// A part of an image.
pub(crate) struct Piece {
    /// Zeros before the data, bytes.
    zeros: u64,
    data: Vec<u8>,
    /// Of the whole image.
    size_bytes: u64,
}

/// This host's node, which asks the source's.
pub(crate) struct Node {
    client: ImagesClient,
    session: String,
}

impl Node {
    /// Connects to the node's socket.
    pub(crate) async fn connect(socket: &Path, session: String) -> Result<Node, String> {
        let address = format!("unix://{}", socket.display());
        let client = ttrpc::r#async::Client::connect(&address).await;
        let client = client.map_err(|error| format!("this host's node at {address}: {error}"))?;
        Ok(Node { client: ImagesClient::new(client), session })
    }
}

impl Source for Node {
    async fn read(&self, digest: &str, offset: u64, length: u32) -> Result<Piece, String> {
        let request = ReadRequest {
            session_id: self.session.clone(),
            digest: digest.to_owned(),
            offset,
            length,
            sparse: true,
            ..ReadRequest::default()
        };
        let answer = self.client.read(ttrpc::context::with_timeout(READ_NANOS), &request).await;
        match answer {
            Ok(answer) => Ok(Piece { zeros: answer.zeros, data: answer.data, size_bytes: answer.size_bytes }),
            Err(ttrpc::Error::RpcStatus(status)) => Err(status.message),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Store {
    /// The image with this digest, read from `source` as far as it is not here. `size_bytes`: the source's.
    pub(crate) async fn fetch(
        &self,
        digest: &str,
        size_bytes: u64,
        source: &impl Source,
    ) -> Result<Image, RootfsError> {
        let (scheme, path) = self.content(digest).ok_or_else(|| RootfsError::Fetch {
            digest: digest.to_owned(),
            message: "it is no sha256 digest".to_owned(),
        })?;
        self.make_directories().await?;
        let _lock = self.lock(&path).await?;
        // Another shim may have brought it while this one waited.
        if let Some(image) = self.find_locked(digest).await? {
            return Ok(image);
        }
        let partial = path.with_extension("partial");
        let mut file = Partial::open(&partial, size_bytes)?;
        if file.length > 0 {
            tracing::info!(digest, there = file.length, size_bytes, "an earlier fetch is gone on with");
        }
        while file.length < size_bytes {
            let wanted = u32::try_from(size_bytes - file.length).map_or(CHUNK, |left| left.min(CHUNK));
            let failed = |message| RootfsError::Fetch { digest: digest.to_owned(), message };
            let Piece { zeros, data, size_bytes: size } =
                source.read(digest, file.length, wanted).await.map_err(failed)?;
            if size != size_bytes {
                return Err(failed(format!("it has {size} bytes there, and {size_bytes} were announced")));
            }
            let came = zeros.saturating_add(data.len() as u64);
            if came == 0 || came > size_bytes - file.length || data.len() > wanted as usize {
                let zeros = if zeros > 0 { format!(" behind {zeros} zeros") } else { String::new() };
                return Err(failed(format!(
                    "{} bytes came{zeros} where {wanted} were asked for",
                    data.len()
                )));
            }
            file.append(zeros, &data)?;
        }
        self.adopt(scheme, digest, &partial, &path).await
    }

    /// A partial file that is complete becomes the image, or goes.
    async fn adopt(
        &self,
        scheme: Scheme,
        digest: &str,
        partial: &Path,
        path: &Path,
    ) -> Result<Image, RootfsError> {
        let (digest, partial, path) = (digest.to_owned(), partial.to_owned(), path.to_owned());
        super::store::blocking(move || {
            let failed = |source| RootfsError::Store { path: partial.clone(), source };
            let found = scheme.hash(&partial)?;
            if found != digest {
                // Going on with it would never end well.
                std::fs::remove_file(&partial).map_err(failed)?;
                let message = format!(
                    "what came has the digest {found}; move again to fetch it anew, and when that ends alike, the file on the source has been written to since its container began: end that container and start it again"
                );
                return Err(RootfsError::Fetch { digest, message });
            }
            std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(0o444)).map_err(failed)?;
            File::open(&partial).and_then(|file| file.sync_all()).map_err(failed)?;
            std::fs::rename(&partial, &path).map_err(failed)?;
            let size_bytes = std::fs::metadata(&path).map_err(failed)?.len();
            let image = Image { path, digest, size_bytes };
            super::store::remember(&image)?;
            tracing::info!(digest = image.digest, bytes = size_bytes, "image fetched from the source");
            Ok(image)
        })
        .await
    }
}

/// What has come of an image so far.
struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Partial {
    fn open(path: &Path, size_bytes: u64) -> Result<Partial, RootfsError> {
        let failed = |source| RootfsError::Store { path: path.to_owned(), source };
        let open = |fresh: bool| {
            let mut options = OpenOptions::new();
            options.create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            if fresh {
                std::fs::remove_file(path)?;
            }
            options.open(path)
        };
        let mut file = open(false).map_err(failed)?;
        let mut length = file.metadata().map_err(failed)?.len();
        if length > size_bytes {
            file = open(true).map_err(failed)?;
            length = 0;
        }
        Ok(Partial { path: path.to_owned(), file, length })
    }

    fn append(&mut self, zeros: u64, data: &[u8]) -> Result<(), RootfsError> {
        let failed = |source| RootfsError::Store { path: self.path.clone(), source };
        if zeros > 0 {
            self.file.set_len(self.length + zeros).map_err(failed)?;
        }
        self.file.write_all(data).map_err(failed)?;
        self.length += zeros + data.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Mutex;

    use super::*;

    /// Breaks off before the byte `until`; counts what it gave.
    struct Fake {
        bytes: Vec<u8>,
        until: u64,
        given: Mutex<u64>,
        /// Leaves zeros out, as many as there are, and then says this many more.
        sparse: Option<u64>,
    }

    impl Fake {
        fn new(bytes: &[u8], until: u64) -> Fake {
            Fake { bytes: bytes.to_vec(), until, given: Mutex::new(0), sparse: None }
        }

        fn given(&self) -> u64 {
            *self.given.lock().unwrap()
        }
    }

    impl Source for Fake {
        async fn read(&self, _: &str, offset: u64, length: u32) -> Result<Piece, String> {
            if offset >= self.until {
                return Err("the source is gone".to_owned());
            }
            let mut start = usize::try_from(offset).unwrap();
            let mut zeros = 0;
            if let Some(more) = self.sparse {
                let skipped = self.bytes[start..].iter().take_while(|byte| **byte == 0).count();
                start += skipped;
                zeros = (skipped as u64).saturating_add(more);
            }
            let end = self.bytes.len().min(start + length as usize);
            let data = self.bytes[start..end].to_vec();
            *self.given.lock().unwrap() += data.len() as u64;
            Ok(Piece { zeros, data, size_bytes: self.bytes.len() as u64 })
        }
    }

    fn image() -> (Vec<u8>, String, tempfile::TempDir) {
        let bytes: Vec<u8> =
            (0..(7_u32 << 18)).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let at = tempfile::tempdir().unwrap();
        let file = at.path().join("image");
        std::fs::write(&file, &bytes).unwrap();
        let digest = Scheme::Whole.hash(&file).unwrap();
        (bytes, digest, at)
    }

    fn store(at: &Path) -> Store {
        Store::new(at, "/no/such/program".into(), "/no/such/program".into())
    }

    #[tokio::test]
    async fn an_image_comes_whole_and_is_found_again_without_a_source() {
        let (bytes, digest, at) = image();
        let store = store(at.path());
        assert!(store.find(&digest).await.unwrap().is_none());
        let source = Fake::new(&bytes, u64::MAX);
        let image = store.fetch(&digest, bytes.len() as u64, &source).await.unwrap();
        assert_eq!(
            (std::fs::read(&image.path).unwrap(), source.given()),
            (bytes.clone(), bytes.len() as u64)
        );
        let again = store.fetch(&digest, bytes.len() as u64, &Fake::new(&[], 0)).await.unwrap();
        assert_eq!((again, store.find(&digest).await.unwrap()), (image.clone(), Some(image)));
    }

    #[tokio::test]
    async fn a_fetch_that_broke_off_is_gone_on_with() {
        let (bytes, digest, at) = image();
        let store = store(at.path());
        let size = bytes.len() as u64;
        let broken = store.fetch(&digest, size, &Fake::new(&bytes, 3 << 20)).await.unwrap_err().to_string();
        assert!(broken.contains(&digest) && broken.contains("the source is gone"), "{broken}");
        assert!(store.find(&digest).await.unwrap().is_none(), "half an image is none");
        let rest = Fake::new(&bytes, u64::MAX);
        let image = store.fetch(&digest, size, &rest).await.unwrap();
        assert_eq!(rest.given(), size - (3 << 20), "what was there is not read again");
        assert_eq!(Scheme::Whole.hash(&image.path).unwrap(), digest);
    }

    #[tokio::test]
    async fn zeros_neither_come_nor_take_room_and_a_break_in_them_is_gone_on_with() {
        let at = tempfile::tempdir().unwrap();
        let store = store(at.path());
        let mut bytes = vec![0; 32 << 20];
        bytes[3 << 20] = 1;
        bytes[(20 << 20)..(21 << 20)].fill(2);
        let size = bytes.len() as u64;
        let file = at.path().join("image");
        std::fs::write(&file, &bytes).unwrap();
        let digest = Scheme::Sparse.hash(&file).unwrap();
        let source = |until, more| Fake { sparse: Some(more), ..Fake::new(&bytes, until) };
        store.fetch(&digest, size, &source(4 << 20, 0)).await.unwrap_err();
        let partial = store.content(&digest).unwrap().1.with_extension("partial");
        assert_eq!(partial.metadata().unwrap().len(), 4 << 20, "the zeros before the data and the data");
        // More zeros than there is room for.
        let wrong = store.fetch(&digest, size, &source(u64::MAX, u64::MAX)).await.unwrap_err().to_string();
        assert!(wrong.contains("zeros"), "{wrong}");
        let rest = source(u64::MAX, 0);
        let image = store.fetch(&digest, size, &rest).await.unwrap();
        assert_eq!(rest.given(), 1 << 20);
        assert!(bytes == std::fs::read(&image.path).unwrap());
        let room = image.path.metadata().unwrap().blocks() * 512;
        assert!(room < 4 << 20, "{room} bytes are taken");
        assert_eq!(store.find(&digest).await.unwrap(), Some(image));
    }

    #[tokio::test]
    async fn what_came_wrong_is_never_served() {
        let (bytes, digest, at) = image();
        let store = store(at.path());
        let size = bytes.len() as u64;
        let mut wrong = bytes.clone();
        wrong[5 << 20] ^= 1;
        let refused = store.fetch(&digest, size, &Fake::new(&wrong, u64::MAX)).await.unwrap_err();
        assert!(matches!(refused, RootfsError::Fetch { .. }), "{refused}");
        assert!(store.find(&digest).await.unwrap().is_none());
        // A partial file with rubbish in it, or longer than the image, costs one try at most.
        let partial = store.content(&digest).unwrap().1.with_extension("partial");
        std::fs::write(&partial, vec![1; bytes.len() + 1]).unwrap();
        store.fetch(&digest, size, &Fake::new(&bytes, u64::MAX)).await.unwrap();
        let other = store.fetch(&digest, size + 1, &Fake::new(&bytes, u64::MAX)).await.unwrap();
        assert_eq!(other.size_bytes, size, "it is found by its digest");
        assert!(store.fetch("sha256:zz", 1, &Fake::new(&bytes, 9)).await.is_err());
    }

    #[tokio::test]
    async fn an_image_that_was_altered_in_the_store_is_not_found() {
        let (bytes, digest, at) = image();
        let store = store(at.path());
        let image = store.fetch(&digest, bytes.len() as u64, &Fake::new(&bytes, u64::MAX)).await.unwrap();
        let mut wrong = bytes.clone();
        wrong[100] ^= 1;
        std::fs::remove_file(&image.path).unwrap();
        std::fs::write(&image.path, wrong).unwrap();
        assert!(store.find(&digest).await.unwrap().is_none());
        let source = Fake::new(&bytes, u64::MAX);
        store.fetch(&digest, bytes.len() as u64, &source).await.unwrap();
        assert_eq!(std::fs::read(&image.path).unwrap(), bytes);
    }
}
