//! A thread that works inside network namespaces.
//!
//! Called by the pool, the policy and whoever needs a socket inside a VM's namespace. It enters a
//! namespace for each job with setns(2), which concerns the calling thread alone; a socket or tap
//! made there stays in that namespace wherever it is used later. Never runs a job in the
//! namespace that it was started in.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// What the thread is sent.
enum Order {
    Work(Job),
    /// The last one; its drop is the answer to whoever waits.
    End(mpsc::Sender<()>),
}

/// The way to one such thread; it ends when the last one is dropped, or when it is told to.
#[derive(Clone, Debug)]
pub struct NamespaceThread {
    orders: mpsc::Sender<Order>,
}

impl NamespaceThread {
    /// Starts a thread called `name`.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(name: &str) -> io::Result<Self> {
        let (orders, queue) = mpsc::channel::<Order>();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for order in queue {
                    match order {
                        Order::Work(job) => job(),
                        Order::End(_waiting) => return,
                    }
                }
            })?;
        Ok(Self { orders })
    }

    /// Ends the thread behind the work that it has, and refuses all that comes later. Blocks.
    pub fn end(&self) {
        let (waiting, answered) = mpsc::channel();
        drop(self.orders.send(Order::End(waiting)));
        // The thread drops it behind its work, or had ended before.
        assert!(answered.recv().is_err(), "an end has no other answer");
    }

    /// Runs `work` on the thread, wherever the job before left it: for work that makes a namespace.
    ///
    /// # Errors
    /// What `work` says, or [`io::ErrorKind::BrokenPipe`] when the thread is gone.
    pub async fn run<T, W>(&self, work: W) -> io::Result<T>
    where
        T: Send + 'static,
        W: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move || {
            // The caller may have given up; then nobody needs the answer.
            drop(answer.send(work()));
        });
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the namespace thread ended");
        self.orders.send(Order::Work(job)).map_err(|_e| gone())?;
        answered.await.map_err(|_e| gone())?
    }

    /// Runs `work` inside the namespace bound at `path`.
    ///
    /// # Errors
    /// When the namespace cannot be entered, else as [`Self::run`].
    pub async fn inside<T, W>(&self, path: &Path, work: W) -> io::Result<T>
    where
        T: Send + 'static,
        W: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let path: PathBuf = path.to_owned();
        self.run(move || {
            let namespace = File::open(&path)?;
            let kind = LinkNameSpaceType::Network;
            move_into_link_name_space(namespace.as_fd(), Some(kind))?;
            work()
        })
        .await
    }
}
