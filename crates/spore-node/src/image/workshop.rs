//! Image work as a whole: how much at once, how long, and what is left of a killed daemon's.
//!
//! Called by the daemon for uploads and builds. A call waits for a place, then works on a thread
//! that may block, in a [`Job`]. Whoever stops waiting for a call ends its work.
//!
//! ```text
//!   call ──▶ lane (places, a short queue, else busy) ──▶ job ──▶ packer.rs, debian.rs
//!    │ dropped, or its time is over                        ▲
//!    └─────────────────── ends ────────────────────────────┘
//! ```

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use spore_wire::node::{ImageInfo, ImageKind, ImageRecipe};
use thiserror::Error;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::io::SyncIoBridge;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::debian::{DebianBuilder, DebianError, recipe};
use super::job::{BUILD_LIMITS, Ended, Ender, Job, UPLOAD_LIMITS};
use super::pack::PackRequest;
use super::packer::{BuildError, Packer};
use super::store::{Filing, ImageStore, StoreError};
use crate::cgroup::{Cgroups, Limits};

/// An archive on its way.
pub type Body = Box<dyn AsyncRead + Send + Unpin>;

/// What image work is made of on this host, and its bounds.
#[derive(Clone, Debug)]
pub struct WorkshopConfig {
    /// Where images are.
    pub images: ImageStore,
    /// How they are packed.
    pub packer: Packer,
    /// How they are built from packages.
    pub builder: DebianBuilder,
    /// The cgroups that jobs lie in, beside those of VMs.
    pub cgroups: Cgroups,
    /// How much of it there may be.
    pub bounds: Bounds,
}

/// How much image work there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Uploads.
    pub uploads: LaneBounds,
    /// Builds from packages.
    pub builds: LaneBounds,
    /// How long an upload may be silent.
    pub idle: Duration,
}

/// How much there may be of one kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneBounds {
    /// So many at once.
    pub at_once: usize,
    /// So many more may wait.
    pub waiting: usize,
    /// How long one waits at most.
    pub patience: Duration,
    /// How long one takes at most.
    pub time: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            uploads: LaneBounds {
                at_once: 2,
                waiting: 8,
                patience: Duration::from_secs(60),
                // The largest upload over a slow line.
                time: Duration::from_secs(60 * 60),
            },
            builds: LaneBounds {
                at_once: 1,
                waiting: 4,
                patience: Duration::from_secs(10 * 60),
                // Two hundred packages from a slow mirror.
                time: Duration::from_secs(30 * 60),
            },
            idle: Duration::from_secs(60),
        }
    }
}

/// Why there is no new image.
#[derive(Debug, Error)]
pub enum WorkError {
    /// There is too much to do already.
    #[error("{at_once} {what} under way and {waiting} waiting are the most: try again in a minute")]
    Busy {
        /// Of which kind.
        what: &'static str,
        /// How many there may be.
        at_once: usize,
        /// How many may wait.
        waiting: usize,
    },
    /// The archive or the worker.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Packages.
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// Its processes could not be limited.
    #[error("cannot make a cgroup for image work")]
    Cgroup(#[source] io::Error),
    /// The thread that did it is gone.
    #[error("the thread of image work ended")]
    Thread(#[from] JoinError),
}

/// All image work of this daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Workshop {
    shop: Arc<Shop>,
}

#[derive(Debug)]
struct Shop {
    config: WorkshopConfig,
    uploads: Lane,
    builds: Lane,
}

impl Workshop {
    /// Takes what there is.
    #[must_use]
    pub fn new(config: WorkshopConfig) -> Self {
        let uploads = Lane::new("uploads", config.bounds.uploads);
        let builds = Lane::new("image builds", config.bounds.builds);
        let shop = Shop {
            config,
            uploads,
            builds,
        };
        Self {
            shop: Arc::new(shop),
        }
    }

    /// Removes what a killed daemon left. Legal at the daemon's start, once the cgroups that are
    /// nobody's are gone.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let WorkshopConfig {
            images, builder, ..
        } = &self.shop.config;
        if let Err(error) = builder.sweep() {
            // Nothing that serves depends on it.
            tracing::warn!(folder = %builder.scratch.display(), %error, "a build's folder is left");
        }
        images.sweep()
    }

    /// Makes an image of an archive (tar or tar.zst).
    ///
    /// # Errors
    /// [`WorkError`]; nothing is left then.
    pub async fn import(
        &self,
        body: Body,
        kind: ImageKind,
        filing: Filing,
    ) -> Result<ImageInfo, WorkError> {
        let place = self.shop.uploads.enter().await?;
        let stop = CancellationToken::new();
        let body = Watched::new(body, self.shop.config.bounds.idle, stop.clone());
        let mut archive = SyncIoBridge::new(body);
        let work = move |config: &WorkshopConfig, job: &Job| {
            let request = PackRequest::of(kind);
            let (packer, images) = (&config.packer, &config.images);
            Ok(packer.pack(images, request, &mut archive, filing, job)?)
        };
        let time = self.shop.config.bounds.uploads.time;
        self.work(place, UPLOAD_LIMITS, time, stop, work).await
    }

    /// Builds a root image of Debian's essential packages and `packages`.
    ///
    /// # Errors
    /// [`WorkError`]; nothing is left then.
    pub async fn build(
        &self,
        packages: Vec<String>,
        filing: Filing,
    ) -> Result<ImageInfo, WorkError> {
        let place = self.shop.builds.enter().await?;
        let work = move |config: &WorkshopConfig, job: &Job| {
            let (builder, packer, images) = (&config.builder, &config.packer, &config.images);
            Ok(builder.build(&packages, packer, images, filing, job)?)
        };
        let time = self.shop.config.bounds.builds.time;
        let stop = CancellationToken::new();
        self.work(place, BUILD_LIMITS, time, stop, work).await
    }

    async fn work<T: Send + 'static>(
        &self,
        place: OwnedSemaphorePermit,
        limits: Limits,
        time: Duration,
        stop: CancellationToken,
        work: impl FnOnce(&WorkshopConfig, &Job) -> Result<T, WorkError> + Send + 'static,
    ) -> Result<T, WorkError> {
        let cgroups = self.shop.config.cgroups.clone();
        let job = tokio::task::spawn_blocking(move || Job::begin(&cgroups, &limits)).await?;
        let job = job.map_err(WorkError::Cgroup)?;
        let end = EndOnDrop {
            ender: job.ender(),
            stop,
        };
        let shop = Arc::clone(&self.shop);
        let mut working = tokio::task::spawn_blocking(move || {
            let done = work(&shop.config, &job);
            // Its place is free once nothing of it runs any more.
            drop(job);
            drop(place);
            done
        });
        if let Ok(done) = timeout(time, &mut working).await {
            return done?;
        }
        end.now(Ended::Timeout(time.as_secs()));
        working.await?
    }
}

/// The packages of a recipe.
///
/// # Errors
/// [`DebianError::Recipe`].
pub fn packages(from: ImageRecipe) -> Result<Vec<String>, DebianError> {
    match from {
        ImageRecipe::Packages { packages } => Ok(packages),
        ImageRecipe::Base { name } => recipe(&name),
    }
}

/// Ends work that nobody waits for any more; of work that is over nothing is left to end.
struct EndOnDrop {
    ender: Ender,
    stop: CancellationToken,
}

impl EndOnDrop {
    fn now(&self, why: Ended) {
        self.ender.end(why);
        // Only now, so that whoever reads the body finds the reason.
        self.stop.cancel();
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.now(Ended::Cancelled);
    }
}

/// Places for one kind of work, and a short queue before them.
#[derive(Debug)]
struct Lane {
    what: &'static str,
    bounds: LaneBounds,
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Lane {
    fn new(what: &'static str, bounds: LaneBounds) -> Self {
        Self {
            what,
            bounds,
            places: Arc::new(Semaphore::new(bounds.at_once)),
            waiting: AtomicUsize::new(0),
        }
    }

    async fn enter(&self) -> Result<OwnedSemaphorePermit, WorkError> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(place);
        }
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _left = scopeguard(&self.waiting);
        if before >= self.bounds.waiting {
            return Err(self.busy());
        }
        let place = Arc::clone(&self.places).acquire_owned();
        match timeout(self.bounds.patience, place).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(self.busy()),
        }
    }

    const fn busy(&self) -> WorkError {
        WorkError::Busy {
            what: self.what,
            at_once: self.bounds.at_once,
            waiting: self.bounds.waiting,
        }
    }
}

/// Counts one less when it is dropped: whoever waits may be dropped too.
fn scopeguard(count: &AtomicUsize) -> impl Drop + '_ {
    struct Less<'a>(&'a AtomicUsize);
    impl Drop for Less<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    Less(count)
}

/// A body that fails when it is silent for too long, or when its work is ended.
struct Watched {
    inner: Body,
    idle: Duration,
    /// Runs while a byte is waited for.
    silence: Option<Pin<Box<Sleep>>>,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Watched {
    fn new(inner: Body, idle: Duration, stop: CancellationToken) -> Self {
        Self {
            inner,
            idle,
            silence: None,
            stopped: Box::pin(stop.cancelled_owned()),
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.stopped.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Poll::Ready(read) = Pin::new(&mut this.inner).poll_read(context, buffer) {
            this.silence = None;
            return Poll::Ready(read);
        }
        let idle = this.idle;
        let silence = this.silence.get_or_insert_with(|| Box::pin(sleep(idle)));
        ready!(silence.as_mut().poll(context));
        let message = format!("not a byte of it came for {} s", idle.as_secs());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio_util::sync::CancellationToken;

    use super::{Lane, LaneBounds, Watched, WorkError};

    const BOUNDS: LaneBounds = LaneBounds {
        at_once: 1,
        waiting: 1,
        patience: Duration::from_secs(60),
        time: Duration::from_secs(60),
    };

    #[tokio::test(start_paused = true)]
    async fn one_works_one_waits_and_the_third_is_told_to_come_back() {
        let lane = Lane::new("uploads", BOUNDS);
        let first = lane.enter().await.unwrap();
        let mut second = Box::pin(lane.enter());
        assert!(
            tokio::time::timeout(Duration::from_secs(1), &mut second)
                .await
                .is_err()
        );
        let third = lane.enter().await.unwrap_err();
        assert!(
            third.to_string().contains("try again in a minute"),
            "{third}"
        );
        drop(first);
        let second = second.await.unwrap();
        // Whoever gives up frees its place in the queue.
        drop(tokio::time::timeout(Duration::from_secs(1), lane.enter()).await);
        let late = lane.enter().await;
        assert!(
            matches!(late, Err(WorkError::Busy { .. })),
            "after its patience"
        );
        drop(second);
        drop(lane.enter().await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_fails_and_a_slow_one_does_not() {
        let (mut from, body) = duplex(16);
        let idle = Duration::from_secs(60);
        let mut body = Watched::new(Box::new(body), idle, CancellationToken::new());
        tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(59)).await;
                from.write_all(b"x").await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let mut ten = [0; 10];
        body.read_exact(&mut ten).await.unwrap();
        let silent = body.read_u8().await.unwrap_err();
        assert_eq!(silent.kind(), std::io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_body_ends_with_its_work() {
        let (_from, body) = duplex(16);
        let stop = CancellationToken::new();
        let mut body = Watched::new(Box::new(body), Duration::from_secs(60), stop.clone());
        let (read, ()) = tokio::join!(body.read_u8(), async { stop.cancel() });
        assert_eq!(
            read.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionAborted
        );
    }
}
